"""Results of many jobs beside each other."""
