"""Every rule as a drop-in torch.optim.Optimizer, with its scheduler.

May import: core, numerics, registry, fx_graph, torch_internals.
"""
