"""The processes that load: they end with their iterator, and a death or a standstill is told."""

import gc
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import tempfile
import time

import pytest

from hdm_lightning.data import worker_processes
from hdm_lightning.data.datamodule import ShardDataModule
from hdm_lightning.data.loader import StreamLoader
from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.errors import UserError


def test_configs_and_plans_can_be_sent_to_spawned_workers(kit, shards):
    config = kit.stream_config(shards)
    plan = Plan(config)
    plan.locate(50)
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.locate(p).key for p in range(300)] == [plan.locate(p).key for p in range(300)]
    assert pickle.loads(pickle.dumps(config)) == config


def test_far_more_workers_than_cores_are_told_and_what_is_told_is_not(kit, shards, monkeypatch):
    """64 workers on two cores took two minutes for 64 samples, without a word."""
    for cores in (1, 2, 16):
        monkeypatch.setattr(worker_processes, "available_cores", lambda cores=cores: cores)
        for workers in (0, 1, 2, 4, 8, 9, 64, 65):
            for ranks in (1, 2, 4):
                told = worker_processes.crowding(workers, ranks)
                assert bool(told) == (workers * ranks > 4 * cores)
                if told:
                    assert f"{workers} data workers" in told
                    fewer = int(re.search(r"data\.num_workers=(\d+)", told)[1])
                    assert fewer <= workers and not (cores >= ranks and worker_processes.crowding(fewer, ranks))
    monkeypatch.setattr(worker_processes, "available_cores", lambda: 2)
    module = ShardDataModule(str(shards), resolution=8, batch_size=4, tokenizer=kit.letters, num_workers=64)
    assert "64 data workers share 2 cores" in module.notes()[-1]


def test_workers_end_with_their_iterator(kit, shards):
    config = kit.stream_config(shards, workers=2)
    batches = iter(StreamLoader(config, Plan(config), kit.letters, batch_size=4))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    gc.collect()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_run_with_an_error(kit, shards):
    config = kit.stream_config(shards, workers=2)
    batches = iter(StreamLoader(config, Plan(config), kit.letters, batch_size=4))
    next(batches)
    with pytest.raises(RuntimeError, match="worker"):
        for child in multiprocessing.active_children():
            child.kill()  # torch's handler may raise right here
        for _ in range(100):
            next(batches)


def test_a_death_that_no_signal_tells_of_is_noticed(kit, shards, monkeypatch):
    """As where torch's handler goes off inside a destructor, whose errors Python drops; nothing is on its way."""
    monkeypatch.setattr(worker_processes, "POLL_S", 0.5)

    def dies(caption):
        os.kill(os.getpid(), signal.SIGKILL)

    config = kit.stream_config(shards, workers=1)
    batches = iter(StreamLoader(config, Plan(config), dies, batch_size=4))
    set_handler = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_handler(number, signal.SIG_DFL))
    begun, before = time.monotonic(), set_handler(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(RuntimeError, match="worker"):
            next(batches)
    finally:
        set_handler(signal.SIGCHLD, before)
    assert time.monotonic() - begun < 60


def test_a_worker_that_is_stuck_ends_the_run_with_a_message(kit, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_processes, "WORKER_TIMEOUT_S", 2)
    monkeypatch.setattr(worker_processes, "POLL_S", 0.5)
    free = tmp_path / "free"

    def stuck(caption):
        while not free.exists():
            time.sleep(0.05)
        return kit.letters(caption)

    config = kit.stream_config(shards, workers=1)
    batches = iter(StreamLoader(config, Plan(config), stuck, batch_size=4))
    with pytest.raises(RuntimeError, match="sent nothing for 2 s"):
        next(batches)
    free.touch()


@pytest.mark.parametrize("error", [ConnectionResetError, BrokenPipeError, EOFError])
def test_a_worker_that_dies_while_it_hands_over_is_told_too(error):
    def chunks():
        yield "a chunk"
        raise error

    handed = worker_processes.naming_dead_workers(chunks())
    assert next(handed) == "a chunk"
    with pytest.raises(RuntimeError, match="worker was killed"):
        next(handed)


def test_a_worker_s_own_time_out_ends_the_run_with_its_error(kit, shards):
    """Torch's own time-outs are waited through; a stream must not end for one of a worker."""

    def refused(caption):
        raise RuntimeError("the server's answer: read timed out")

    config, others = kit.stream_config(shards, workers=1), set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="read timed out"):
        next(iter(StreamLoader(config, Plan(config), refused, batch_size=4)))
    assert set(multiprocessing.active_children()) <= others  # while the error still holds torch's iterator


def test_a_folder_too_long_for_sockets_is_named_before_any_worker_starts(kit, shards, tmp_path, monkeypatch):
    """It is refused where, and only where, the system refuses a socket of the name that Python would give it."""
    config = kit.stream_config(shards, workers=1)
    outcomes, short = set(), tempfile.mkdtemp()
    for length in range(60, 90):
        folder = f"{short}/{'x' * (length - len(short) - 1)}"
        os.makedirs(f"{folder}/pymp-abcdefgh", exist_ok=True)
        with socket.socket(socket.AF_UNIX) as end:
            try:
                end.bind(f"{folder}/pymp-abcdefgh/listener-abcdefgh")
                fits = True
            except OSError:
                fits = False
        try:
            worker_processes.require_room_for_sockets(folder)
            accepted = True
        except UserError:
            accepted = False
        assert accepted == fits, length
        outcomes.add(fits)
    assert outcomes == {True, False}
    shutil.rmtree(short)
    others = set(multiprocessing.active_children())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("y" * 90)))
    with pytest.raises(UserError, match=r"data\.num_workers=0") as caught:
        next(iter(StreamLoader(config, Plan(config), kit.letters, batch_size=4)))
    assert caught.value.where == "TMPDIR" and set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("loaders", [1, 2, 16])
@pytest.mark.parametrize("free_mb", [1, 16, 64, 500])
@pytest.mark.parametrize("workers", [1, 4, 8, 64])
def test_workers_without_shared_memory_are_refused_and_the_hint_helps(workers, free_mb, loaders):
    free, chunk = free_mb << 20, 4 << 20
    needed = workers * 3 * chunk * loaders
    if needed <= free:
        return worker_processes.require_shared_memory(workers, chunk, free, loaders)
    with pytest.raises(UserError, match="of shared memory") as caught:
        worker_processes.require_shared_memory(workers, chunk, free, loaders)
    fit = int(re.search(r"data\.num_workers=(\d+)", caught.value.hint)[1])
    worker_processes.require_shared_memory(fit, chunk, free, loaders)
    gigabytes = int(re.search(r"--shm-size=(\d+)g", caught.value.hint)[1])
    worker_processes.require_shared_memory(workers, chunk, gigabytes << 30, loaders)
    worker_processes.require_shared_memory(workers, chunk, None, loaders)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("validated", [True, False])
def test_shared_memory_is_counted_for_all_ranks_here_and_for_validation(kit, shards, monkeypatch, ranks, validated):
    """Of 16 × 16 pixels: 5461 samples fit a chunk, 16 are sent."""
    config = kit.stream_config(shards, workers=2)
    needed = 2 * 3 * 16 * 3 * 16 * 16 * ranks * (2 if validated else 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    made = StreamLoader(config, Plan(config), kit.letters, batch_size=4, validated=validated)
    assert made.workers == 2
    monkeypatch.setattr(worker_processes, "free_shared_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"data\.num_workers"):
        next(iter(made))
    monkeypatch.setattr(worker_processes, "free_shared_memory", lambda: needed)
    assert next(iter(made))["image"].shape == (4, 3, 16, 16)


def test_ranks_on_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for gpus, world, here in ((0, 1, 1), (0, 4, 4), (8, 4, 4), (8, 16, 8)):
        monkeypatch.setattr(worker_processes.torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert worker_processes.ranks_here(world) == here
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert worker_processes.ranks_here(12) == 3


def test_a_worker_that_is_killed_is_known_from_what_torch_says(kit, shards, monkeypatch):
    monkeypatch.setattr(worker_processes, "POLL_S", 1)
    config = kit.stream_config(shards, workers=2)
    batches = iter(StreamLoader(config, Plan(config), kit.letters, batch_size=2))
    others = {child.pid for child in multiprocessing.active_children()}
    next(batches)
    pid = next(child.pid for child in multiprocessing.active_children() if child.pid not in others)
    with pytest.raises(RuntimeError) as caught:
        os.kill(pid, signal.SIGKILL)  # torch's handler may raise right here
        for _ in range(1000):
            next(batches)
    assert worker_processes.is_dead_worker(caught.value)
    assert not worker_processes.is_dead_worker(RuntimeError("Caught UserError in DataLoader worker process 0."))
