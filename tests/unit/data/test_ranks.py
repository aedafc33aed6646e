"""Gloo processes over uneven shards, killed and resumed on other numbers of ranks: the plan is kept to the sample."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist

from hdm_lightning.data.sample_plan import Plan
from hdm_lightning.data.samples import stream

BATCH = 3
SAVE_EVERY = 2
TOTAL = 480


def train(rank, world, data_module, folder, meeting):
    """A training loop without a model: lockstep, a log of what it saw, a checkpoint of one integer."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    state = folder / "state.json"
    consumed = json.loads(state.read_text())["consumed"] if state.exists() else 0
    module = data_module(consumed=consumed)
    assert module.rank_and_world() == (rank, world)
    with (folder / f"log-{world}-{rank}-{consumed}.jsonl").open("a") as log:
        for step, batch in enumerate(module.train_dataloader(), start=1):
            position = torch.tensor([float(batch["index"].min())])
            dist.all_reduce(position, op=dist.ReduceOp.MIN)
            assert position.item() == consumed  # all ranks are at the same global batch
            consumed += BATCH * world
            rows = zip(batch["index"].tolist(), batch["keys"], batch["weight"].tolist(), strict=True)
            log.write("".join(json.dumps(row) + "\n" for row in rows))
            log.flush()
            if step % SAVE_EVERY == 0 or consumed >= TOTAL:
                dist.barrier()
                if rank == 0:
                    temporary = state.with_suffix(".new")
                    temporary.write_text(json.dumps({"consumed": consumed}))
                    os.replace(temporary, state)
            if consumed >= TOTAL:
                break
    dist.destroy_process_group()


def run(world, data_module, folder, kill_after):
    """Start the ranks; kill one of them once that many samples are logged. Returns the exit codes."""
    context = multiprocessing.get_context("fork")
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    ranks = [context.Process(target=train, args=(rank, world, data_module, folder, meeting)) for rank in range(world)]
    for process in ranks:
        process.start()
    begin = logged(folder)
    deadline = time.monotonic() + 100
    while kill_after is not None and logged(folder) - begin < kill_after:
        assert time.monotonic() < deadline and ranks[-1].is_alive()
        time.sleep(0.01)
    if kill_after is not None:
        os.kill(ranks[-1].pid, signal.SIGKILL)
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
        assert process.exitcode is not None, "a rank hangs"
    return [process.exitcode for process in ranks]


def logged(folder):
    return sum(len(file.read_text().splitlines()) for file in folder.glob("log-*.jsonl"))


def kept_rows(folder, ends):
    """What was trained on and not rolled back: positions from the start of a run to the checkpoint it ended at."""
    rows = []
    for file in folder.glob("log-*.jsonl"):
        begin = int(file.stem.rsplit("-", 1)[1])
        for line in file.read_text().splitlines():
            index, key, weight = json.loads(line)
            if begin <= index < ends[begin]:
                rows.append((index, key, weight))
    return sorted(rows)


@pytest.mark.parametrize("worlds", [(2, 4, 2), (4, 2, 4)])
def test_killed_and_resumed_ranks_see_exactly_the_plan(kit, tmp_path, worlds):
    shards = kit.write_shards(tmp_path / "shards", [41, 7, 60, 1, 41])
    broken = (shards / "002.tar").read_bytes()
    (shards / "002.tar").write_bytes(broken[: len(broken) // 2])
    config = kit.stream_config(shards)
    data_module = partial(kit.data_module, shards, batch_size=BATCH, num_workers=1)
    folder = tmp_path / "run"
    folder.mkdir()
    ends = {}
    for number, world in enumerate(worlds):
        state = folder / "state.json"
        begin = json.loads(state.read_text())["consumed"] if state.exists() else 0
        last = number == len(worlds) - 1
        codes = run(world, data_module, folder, kill_after=None if last else 120)
        assert all(code == 0 for code in codes) if last else codes[-1] == -signal.SIGKILL
        ends[begin] = json.loads(state.read_text())["consumed"]
    rows = kept_rows(folder, ends)
    expected = [(s.index, s.key, s.weight) for s in stream(config, kit.letters, stop=ends[max(ends)])]
    assert rows == expected
    times = Counter(key for index, key, _ in rows if index < 450)
    assert len(times) == 150 and set(times.values()) == {3}
    assert Plan(config).samples == 150
    assert 20 < sum(weight == 0 for index, _, weight in rows if index < 150) < 40
