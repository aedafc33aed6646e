"""Sharding, compilation and strategies of `lightning.Trainer`, and what processes tell each other."""
