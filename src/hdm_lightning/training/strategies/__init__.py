"""Sharding, compilation, strategies of `lightning.Trainer`, and communication between processes.

Importing `own_strategies` registers `Trainer(strategy="fsdp2")` and `Trainer(strategy="ddp_static_graph")`.
"""
