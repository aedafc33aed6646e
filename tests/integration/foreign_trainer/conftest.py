"""Parts of a training at toy size for anybody's `lightning.Trainer`, and processes that share one."""

import os
import pickle
import tempfile
import traceback
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hdm_lightning import XUT, FlowModule, ShardDataModule, load_autoencoder, load_text_encoder
from hdm_lightning.training.optimization.learning_rates import warmup_cosine
from toy_run import CONFIG


@pytest.fixture(scope="session")
def encoders(tiny_text_encoder, tiny_autoencoder):
    """A frozen text encoder and a frozen autoencoder."""
    return load_text_encoder(str(tiny_text_encoder)), load_autoencoder(str(tiny_autoencoder))


@pytest.fixture
def flow_module(encoders):
    """Function that gives a new module, the same at every call but for what is changed."""

    def build(network=None, **changes):
        if network is None:
            torch.manual_seed(0)
            network = XUT(CONFIG)
        schedule = partial(warmup_cosine, samples=96, samples_per_step=16, warmup_samples=32)
        settings = {"learning_rate": 0.2, "seed": 3, "lr_scheduler": schedule} | changes
        return FlowModule(network, *encoders, **settings)

    return build


@pytest.fixture
def shard_data(encoders, tiny_shards):
    """Function that gives new data, the same at every call but for what is changed."""

    def build(batch_size=4, **changes):
        settings = {"resolution": 16, "context_length": 8, "num_workers": 0, "seed": 3, "validation_samples": 10}
        settings |= {"tokenizer": encoders[0].tokenizer, "lanes": 4, "window": 4, "validation_batch_size": 4}
        return ShardDataModule(str(tiny_shards), batch_size=batch_size, **(settings | changes))

    return build


@pytest.fixture
def trainer(tmp_path):
    """Function that gives a plain `lightning.Trainer` on the CPU; keywords as of that class."""

    def build(**changes):
        settings = {"max_steps": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
        settings |= {"check_val_every_n_epoch": None, "val_check_interval": 4, "default_root_dir": tmp_path}
        settings |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return L.Trainer(accelerator="cpu", enable_model_summary=False, **(settings | changes))

    return build


@pytest.fixture
def on_processes(tmp_path):
    """Function of a number and of a function that runs it on so many processes; gives what it returned on each.

    The function is given the keywords that a trainer needs to be one of them. Each process is a fork of this one.
    """

    def run(world, work):
        meeting = Path(tempfile.mkdtemp(dir=tmp_path))
        pids = [_fork(rank, world, meeting, work) for rank in range(world)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert not any(statuses), (meeting / "error").read_text() if (meeting / "error").exists() else statuses
        return [pickle.loads((meeting / f"result{rank}").read_bytes()) for rank in range(world)]

    return run


def _fork(rank, world, meeting, work):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1", TORCHELASTIC_RUN_ID="test")
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(meeting / "store"), world), rank=rank, world_size=world
        )
        rank_zero_only.rank = rank
        plugins = {"devices": world, "strategy": DDPStrategy(), "plugins": [TorchElasticEnvironment()]}
        (meeting / f"result{rank}").write_bytes(pickle.dumps(work(use_distributed_sampler=False, **plugins)))
        status = 0
    except BaseException:
        (meeting / "error").write_text(traceback.format_exc())
    finally:
        os._exit(status)


class NoteSteps(L.Callback):
    """Notes the samples of every optimizer step, each step in the order of their index."""

    def __init__(self):
        self.steps = []
        self._step = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Add a micro-batch."""
        self._step += batch["index"].tolist()
        if len(self.steps) < trainer.global_step:
            self.steps.append(sorted(self._step))
            self._step = []

    def on_train_start(self, trainer, pl_module):
        """Steps before this fit are not known."""
        self.steps = [[]] * trainer.global_step

    def samples(self, first=0):
        """The samples of step number `first` (from 0) and of all after it."""
        return [sample for step in self.steps[first:] for sample in step]


class Fail(Exception):
    """What a test's training dies of."""


class FailAfter(L.Callback):
    """Raises at the end of a micro-batch, counted from 1."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Count down."""
        self.batches -= 1
        if self.batches == 0:
            raise Fail


@pytest.fixture
def note_steps():
    """A callback that notes the samples of every step as `steps`."""
    return NoteSteps()


@pytest.fixture
def fails_after():
    """Function of a number of micro-batches and of what then fails: runs it, and checks that it did."""

    def run(batches, fit):
        with pytest.raises(Fail):
            fit(FailAfter(batches))

    return run


@pytest.fixture
def weights_of():
    """Function of a module that gives the weights of its network as one tensor."""
    return lambda module: torch.cat([value.detach().flatten() for value in module.network.state_dict().values()])
