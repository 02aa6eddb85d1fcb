"""A training step as a graph: traced, split, compiled, and checked against autograd.

May import: inner, problems, training.
"""
