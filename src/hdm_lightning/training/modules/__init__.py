"""LightningModules of flow matching and of autoencoders, usable with any Trainer."""
