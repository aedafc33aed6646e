"""The samples of a stream one after another, for one rank, without Lightning."""

from collections.abc import Iterator

from hdm_lightning.data.config import Source, StreamConfig
from hdm_lightning.data.faults import FaultMeter
from hdm_lightning.data.order import first_position
from hdm_lightning.data.plan import Plan
from hdm_lightning.data.preparation import Preparation, Sample, Tokenize

__all__ = ["Sample", "Source", "StreamConfig", "Tokenize", "stream"]


def stream(
    config: StreamConfig,
    tokenize: Tokenize,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    stop: int | None = None,
    training: bool = True,
    plan: Plan | None = None,
) -> Iterator[Sample]:
    """The samples of one rank, in rising order of their global positions, in this process.

    Args:
        config: the stream.
        tokenize: caption to (token numbers, true count).
        rank, world: this rank has the positions g = rank (mod world).
        start: first global position, the number of samples consumed so far.
        stop: global position to end before; None for an endless stream.
        training: False for the first caption and no dropout.
        plan: the plan of the config, if it was made already.

    Raises:
        UserError: too many samples were bad, or the stream cannot be set up.
    """
    preparation = Preparation(config, plan or Plan(config), tokenize, training=training)
    meter = FaultMeter(config.max_bad_share, config.bad_patience)
    position = first_position(start, rank, world)
    while stop is None or position < stop:
        sample = preparation.sample(position)
        meter.count(sample.fault or None)
        yield sample
        position += world
