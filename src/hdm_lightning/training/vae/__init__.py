"""Training of the autoencoder: EQ-VAE and its discriminator (`hdm-train-vae`)."""
