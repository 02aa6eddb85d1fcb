"""Rules made of rules: wrappers around one, partitions of two.

May import: core, registry.
"""
