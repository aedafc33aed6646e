"""Console commands, one thin file each, which compose, check and call."""
