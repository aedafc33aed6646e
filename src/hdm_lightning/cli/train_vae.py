"""`hdm-train-vae`: like `hdm-train`, for an autoencoder."""

from hdm_lightning.cli.train import main_vae as main

__all__ = ["main"]

if __name__ == "__main__":  # torchrun starts modules
    main()
