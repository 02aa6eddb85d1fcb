"""Seconds and bytes of anything, and tables of them.

May import: search.
"""
