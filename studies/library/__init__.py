"""Studies that come with the project.

May import: inner, meta, search, studies, measure, engine, benchmarks.
"""
