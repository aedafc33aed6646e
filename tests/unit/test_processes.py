"""What processes wait for."""

import multiprocessing
import time
from datetime import timedelta

import torch.distributed as dist

from hdm_lightning.training.strategies import processes


def come(rank, meeting, places):
    store = dist.FileStore(str(meeting), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=1))
    for _ in range(2):
        if rank == 0:
            time.sleep(2.5)
            places.put(("first", time.monotonic()))
        processes.wait_for_first()
        places.put((rank, time.monotonic()))
    dist.destroy_process_group()


def test_the_others_wait_longer_for_the_first_than_a_barrier_would(tmp_path):
    """Twice two and a half seconds, where collectives give up after one."""
    context = multiprocessing.get_context("fork")
    places = context.Queue()
    ranks = [context.Process(target=come, args=(rank, tmp_path / "meeting", places)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [places.get(timeout=60) for _ in range(6)]
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    first, second = sorted(when for who, when in found if who == "first")
    left = sorted(when for who, when in found if who == 1)
    assert first <= left[0] and second <= left[1]


def test_one_process_waits_for_nobody():
    processes.wait_for_first()
