"""Math of autoencoder training: equivariance transforms, branches, losses, perceptual features (torch only)."""
