"""The inner loop as a pure function of hypers, and the words estimators share.

May import: inner, problems.
"""
