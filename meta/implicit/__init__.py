"""Hypergradients at an optimum or a fixed point, their linear systems, and one-step ones.

May import: inner, problems, training, tracing.
"""
