"""Lightning modules, stage schedule, callbacks, optimizers and the launch of sequential fits."""
