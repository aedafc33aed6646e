"""Optimizers, parameter groups, learning rates and moments."""
