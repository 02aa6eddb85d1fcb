"""What is trained: the Problem protocol, modules and data, seeded draws.

May import: inner.
"""
