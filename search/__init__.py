"""Tuning: the space, the decision between gradient and search, the run and its result.

May import: inner, meta.
"""
