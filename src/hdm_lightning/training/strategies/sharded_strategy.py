"""Lightning's part in a training whose network is sharded (FSDP2): no wrapper, and checkpoints of whole tensors."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from hdm_lightning.training.strategies.sharded_tensors import load_optimizer, load_weights, whole


class ShardedStrategy(DDPStrategy):
    """DDP's processes and devices around a network that `apply.shard_network` has split over them.

    The network gathers its parameters and averages its gradients by itself, after every micro-batch: left for the last
    one of a step, the gradients would have to be kept whole until then. A checkpoint has the tensors of a DDP run,
    whole, so that either goes on from the other's, on any number of devices.
    """

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
