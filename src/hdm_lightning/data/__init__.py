"""From shards to samples, crops and batches, in an order that survives any restart."""
