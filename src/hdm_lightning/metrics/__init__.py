"""Measures on tensors and arrays, all pure: distances, intervals, image quality, equivariance, prompt-following."""
