"""Metrics, prompt-following checks and the memorisation check."""
