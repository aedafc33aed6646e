"""Strategies of `lightning.Trainer`: `fsdp2` shards an XUT, `ddp_static_graph` is DDP with a static graph."""

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
    """DDP's processes and devices, with `module.network`, an XUT, sharded over them before anything else sees it.

    The network gathers its parameters and averages its gradients by itself, after every micro-batch: waiting for the
    last one of a step would need whole gradients until then. A checkpoint contains the same whole tensors as with DDP,
    so each strategy can resume from the other's checkpoints, on any number of devices.
    """

    def setup_environment(self) -> None:
        """Join the processes and shard the network, unless an earlier fit has done so.

        Raises:
            UserError: the module's network is not an XUT, or the precision scales gradients.
        """
        network = getattr(self.lightning_module, "network", None)
        precision = self.precision_plugin.precision
        if not isinstance(network, XUT) or precision == "16-mixed":
            what = "needs an XUT at `module.network`, and does not support the gradient scaling of float16"
            raise UserError(what, where="strategy=fsdp2", hint="use strategy=ddp, or precision=bf16-mixed")
        super().setup_environment()
        if self.world_size > 1 and not is_sharded(network):
            shard_network(network, self.root_device.type, mixed=precision == "bf16-mixed")
            network.to(self.root_device)

    def configure_ddp(self) -> None:
        """Do nothing: there is no module to wrap."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return whole weights on the CPU of the first process."""
        return whole(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return whole moments on the CPU of the first process."""
        return whole(super().optimizer_state(optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this process's part of the weights."""
        assert self.lightning_module is not None
        load_weights(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's part of the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer(optimizer, state)

    def teardown(self) -> None:
        """Tear down, but leave the network's parts on their devices."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 of an XUT", override=True)


class StaticGraphStrategy(DDPStrategy):
    """DDP with a static graph that also supports gradient accumulation.

    DDP records the graph in the first backward pass and must reduce gradients in it: deferred to the step's last
    micro-batch, as in later steps, that fails. The last one averages these gradients again, which does not change them.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(static_graph=True, **settings)
        self._graph_is_known = False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Defer the reduction of gradients to a later micro-batch, except in the very first one."""
        if not self._graph_is_known:
            self._graph_is_known = True
            yield
            return
        with super().block_backward_sync():
            yield


StrategyRegistry.register(
    "ddp_static_graph", StaticGraphStrategy, description="DDP whose steps all use the same parameters", override=True
)
