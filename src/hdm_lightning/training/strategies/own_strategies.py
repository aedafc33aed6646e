"""Strategies of `lightning.Trainer`: `fsdp2` splits an XUT over devices, `ddp_static_graph` is DDP with one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from hdm_lightning.errors import UserError
from hdm_lightning.models import XUT
from hdm_lightning.training.strategies.parallelize import shard_network
from hdm_lightning.training.strategies.sharded_tensors import is_sharded, load_optimizer, load_weights, whole


class ShardedStrategy(DDPStrategy):
    """DDP's processes and devices around `module.network`, an XUT that is split over them before anything else sees it.

    The network gathers its parameters and averages its gradients by itself, after every micro-batch: left for the last
    one of a step, the gradients would have to be kept whole until then. A checkpoint has the tensors of a DDP run,
    whole, so that either resumes from the other's, on any number of devices.
    """

    def setup_environment(self) -> None:
        """Join the processes and split the network, unless a fit before has.

        Raises:
            UserError: the module's network is no XUT, or its precision scales gradients.
        """
        network = getattr(self.lightning_module, "network", None)
        precision = self.precision_plugin.precision
        if not isinstance(network, XUT) or precision == "16-mixed":
            what = "it splits an XUT at `module.network`, and does not scale gradients as float16 needs it"
            raise UserError(what, where="strategy=fsdp2", hint="use strategy=ddp, or bf16-mixed")
        super().setup_environment()
        if self.world_size > 1 and not is_sharded(network):
            shard_network(network, self.root_device.type, mixed=precision == "bf16-mixed")
            network.to(self.root_device)

    def configure_ddp(self) -> None:
        """Nothing to wrap."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the CPU of the first process."""
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Whole moments on the CPU of the first process."""
        return whole(super().optimizer_state(optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take each process's part of the weights."""
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take each process's part of the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(optimizer, state)

    def teardown(self) -> None:
        """Leave the network on its devices, where its parts belong."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 of an XUT", override=True)


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
