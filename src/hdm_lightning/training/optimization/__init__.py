"""Optimizers, parameter groups and clipping."""
