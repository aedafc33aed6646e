"""Hydra configuration groups, shipped inside the package as hdm_lightning.conf."""
