"""Builders that write WebDataset shards from folders, drawings and synthetic scenes."""
