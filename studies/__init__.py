"""Studies and benchmarks, and the problems they are made on.

May import: inner, meta, search.
"""
