"""Shards to samples to crops to batches, in an order that survives any restart."""
