"""A training that dies in its midst."""

from contextlib import contextmanager

import pytest

from hdm_lightning.training.callbacks.ends import ValidateAtEnds


class Crash(Exception):
    """What it dies of."""


@contextmanager
def crashing_at(step, stage=None):
    """Inside, a training dies after `step` (of `stage`, or of any), before that step's checkpoint; it must."""
    original = ValidateAtEnds.on_step_end

    def fail(self, trainer, module, at):
        original(self, trainer, module, at)
        if at == step and stage in (None, module.stage):
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(ValidateAtEnds, "on_step_end", fail)
        yield
