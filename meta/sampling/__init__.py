"""Hypergradients by sampling: evolution strategies, random directions, populations.

May import: inner, problems, training, tracing, reverse, forward.
"""
