"""What an update rule is: hypers with their ranges, slots, the layout of a model in one vector.

May import: numerics.
"""
