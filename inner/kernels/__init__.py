"""A rule's step on long vectors as a few passes that write where they may.

May import: core, numerics.
"""
