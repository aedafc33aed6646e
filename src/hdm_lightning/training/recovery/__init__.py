"""Stopping on a signal, and going back after a loss that went wrong."""
