"""Optimisers, parameter groups and clipping."""
