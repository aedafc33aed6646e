"""Averages of the weights: half-lives, power functions, post-hoc reconstruction."""
