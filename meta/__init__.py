"""Problems, trainings and every way to a hypergradient.

May import: inner.
"""
