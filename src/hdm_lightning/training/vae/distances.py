"""Moved to `training.callbacks.reconstruction_distances`."""

from hdm_lightning.training.callbacks.reconstruction_distances import ReconstructionDistances

__all__ = ["ReconstructionDistances"]
