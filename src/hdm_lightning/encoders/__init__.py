"""Frozen text encoders and autoencoders behind two small protocols."""
