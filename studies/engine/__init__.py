"""A study as cells: declared, run anywhere, recorded, summed up.

May import: inner, meta, search, studies.
"""
