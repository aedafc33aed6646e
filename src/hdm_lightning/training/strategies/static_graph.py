"""DDP that assumes that every step uses the same parameters: `Trainer(strategy="ddp_static_graph")`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry


class StaticGraphStrategy(DDPStrategy):
    """DDP with a static graph that also accumulates.

    DDP learns the graph in the first backward pass and then has to exchange gradients in it: left for the last
    micro-batch of a step, as all others are, it fails. Averaged twice is averaged once, so the gradients stay what they
    are.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(static_graph=True, **settings)
        self._graph_is_known = False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave the exchange of gradients for a later micro-batch, but for the first one of all."""
        if not self._graph_is_known:
            self._graph_is_known = True
            yield
            return
        with super().block_backward_sync():
            yield


StrategyRegistry.register(
    "ddp_static_graph", StaticGraphStrategy, description="DDP whose steps all use the same parameters", override=True
)
