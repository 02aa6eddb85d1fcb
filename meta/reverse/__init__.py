"""Reverse mode: steps pulled back one by one, states kept or reached again.

May import: inner, problems, training, tracing.
"""
