"""Forecasts of time, memory, disk and cost: pure arithmetic over a table of hardware."""
