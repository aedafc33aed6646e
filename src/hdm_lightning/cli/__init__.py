"""Console commands: one thin file per command that composes, checks and calls."""
