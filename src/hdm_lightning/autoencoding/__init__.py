"""What trains an autoencoder: equivariance transforms, branches, losses, perceptual features (torch only)."""
