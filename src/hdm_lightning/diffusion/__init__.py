"""Flow matching: path, time sampling, loss, samplers and guidance as pure functions."""
