"""What is asked of CUDA, in which order, and which settings follow from the cards there are: seen without one."""

from contextlib import contextmanager
from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module

from hdm_lightning.cli.encode_shards import chosen_devices
from hdm_lightning.errors import UserError
from hdm_lightning.training import hardware
from hdm_lightning.training.callbacks.throughput import SectionClock, memory_gb
from hdm_lightning.training.modules.flow_step import SideStream

CUDA = torch.device("cuda", 1)


@pytest.fixture
def calls():
    """What was asked of CUDA."""
    return []


class Stream:
    """A stream by name, which notes what it waits for."""

    def __init__(self, name, calls):
        self.name, self.calls, self.device = name, calls, CUDA

    def wait_stream(self, other):
        """Note it."""
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch, calls):
    """A current stream and a new one."""
    current, side = Stream("current", calls), Stream("side", calls)

    def of(device, stream):
        assert device == CUDA
        return stream

    @contextmanager
    def entered(stream):
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: of(device, side))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: of(device, current))
    monkeypatch.setattr(torch.cuda, "stream", entered)


def test_tensors_of_the_side_stream_are_waited_for_and_kept_for_the_current_one(streams, calls):
    def tensor(name):
        return SimpleNamespace(record_stream=lambda stream: calls.append(f"{name} kept for {stream.name}"))

    stream = SideStream(CUDA)
    with stream.put():
        calls.append("work")
    stream.take_over([tensor("a"), tensor("b")])
    assert calls == [
        "side waits for current",  # the weights' copies, queued before
        *("on side", "work", "off side"),
        *("current waits for side", "a kept for current", "b kept for current"),
    ]


class Event:
    """A timed event, a millisecond after the one before."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        """Take the next millisecond."""
        Event.made += 1
        self.at = Event.made

    def elapsed_time(self, other):
        """Milliseconds from here to the other."""
        Event.read.append((self.at, other.at))
        return float(other.at - self.at)


def test_a_section_on_cuda_is_timed_by_events_that_are_read_after_one_wait(monkeypatch, calls):
    Event.made, Event.read = 0, calls
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(device))
    clock = SectionClock()
    clock.device = CUDA
    assert clock.drain() == {} and not calls
    with clock.section("outer"), clock.section("inner"):
        pass
    with clock.section("inner"):
        pass
    assert not calls  # the host has not waited
    assert clock.drain() == pytest.approx({"outer": 0.003, "inner": 0.002})
    assert calls[0] == CUDA and sorted(calls[1:]) == [(1, 4), (2, 3), (5, 6)]
    assert clock.drain() == {}


def test_memory_of_a_device_is_its_allocator_s(monkeypatch):
    for name, value in (("memory_allocated", 1), ("max_memory_allocated", 3), ("memory_reserved", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value * 10**9 * (device == CUDA))
    figures = memory_gb(CUDA)
    assert [figures[name] for name in ("device", "device_peak", "reserved")] == [1, 3, 4]


@pytest.fixture
def cards(monkeypatch):
    """Function that sets the number of cards and their compute capability."""

    def present(count, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return present


@pytest.mark.parametrize(("trainer", "wanted"), [("auto", None), ("gpu", 1), ("ddp4", 4), ("cpu", 1)])
def test_a_trainer_takes_the_cards_and_the_precision_that_they_are_fast_in(cards, trainer, wanted):
    """On one, two and four cards of each generation from RTX 20 (7.5) to RTX 50 (12.0)."""
    with initialize_config_module("hdm_lightning.conf", version_base="1.3"):
        composed = compose("train", overrides=[f"trainer={trainer}"])
    assert composed.hardware.compile is (trainer in ("gpu", "ddp4"))
    kind = "cpu" if trainer == "cpu" else "cuda"
    for count, capability in product((1, 2, 4), ((7, 5), (8, 6), (8, 9), (9, 0), (12, 0))):
        cards(count, capability)
        config = deepcopy(composed)
        hardware.resolve(config)
        half = "bf16-mixed" if capability >= (8, 0) else "16-mixed"
        assert (config.trainer.accelerator, config.trainer.precision) == (kind, "32-true" if kind == "cpu" else half)
        if wanted is None or wanted <= count:
            assert hardware.local_devices(config.trainer.devices, kind) == (wanted or count)
            continue
        with pytest.raises(UserError, match=f"4 devices requested, {count} present") as caught:
            hardware.local_devices(config.trainer.devices, kind)
        assert caught.value.where == "trainer.devices" and "auto" in caught.value.hint


def test_shards_are_encoded_on_every_card_or_on_as_many_as_asked_for(cards):
    for count, wanted, expected in (
        (0, "auto", ["cpu"]),
        (0, "2", ["cpu", "cpu"]),
        (1, "auto", ["cuda:0"]),
        (4, "auto", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (4, "2", ["cuda:0", "cuda:1"]),
        (4, "cpu", ["cpu"]),
    ):
        cards(count, (8, 9))
        assert list(chosen_devices(wanted)) == expected
    with pytest.raises(UserError, match="--devices") as caught:
        chosen_devices("5")
    assert "up to 4" in caught.value.hint
