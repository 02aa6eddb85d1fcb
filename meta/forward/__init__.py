"""Forward mode: tangents of the training state carried along.

May import: inner, problems, training, tracing.
"""
