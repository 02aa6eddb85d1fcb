"""Benchmarks beside other libraries, each a command.

May import: inner, meta, search, studies, measure.
"""
