"""Drawings left out of harmless samples on sight, with the reason."""

EXCLUDED: dict[str, str] = {}
