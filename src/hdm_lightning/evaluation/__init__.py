"""A trained model or autoencoder measured as a whole (`hdm-evaluate`)."""
