"""Pure measures on tensors and arrays: distances, intervals, image quality, equivariance, prompt-following."""
