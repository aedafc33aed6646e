"""Moved to `training.modules.autoencoder_objective`."""

from hdm_lightning.training.modules.autoencoder_objective import GeneratorObjective, PerceptualDistance

__all__ = ["GeneratorObjective", "PerceptualDistance"]
