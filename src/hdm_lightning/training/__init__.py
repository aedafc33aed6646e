"""Lightning modules, stage schedule, callbacks, optimisers and the launch of sequential fits."""
