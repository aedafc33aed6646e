"""Sharding, compilation and strategies of `lightning.Trainer`, and what processes exchange.

Importing `own_strategies` lets `Trainer(strategy=…)` know them as `fsdp2` and `ddp_static_graph`.
"""
