"""Averages of the weights: half-lives, power functions, reconstruction afterwards."""
