"""Lightning modules, callbacks, optimizers, the stage schedule, and the launcher that runs it."""
