"""Tune the hyperparameters of a training run by their own gradient."""
