"""Bilevel methods for training losses with many minimisers, or first derivatives alone.

May import: inner, problems, training, tracing, reverse, implicit.
"""
