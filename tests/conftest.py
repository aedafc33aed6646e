"""Tiny parts that many tests share: a text encoder, an autoencoder and shards, saved and loaded by the real code."""

import io
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXT = "a red green blue small large circle square star on the left of right dark light drawing"
WORDS = list(TEXT.split())
SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")


def pytest_configure(config):
    """Hide GPUs where no test asks for one: many tests fork, which a process that has used a GPU cannot do."""
    if not asks_for_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def asks_for_gpu(config):
    """Whether tests were chosen by `-m gpu`."""
    return re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")) is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark as slow what `slow_tests.txt` lists; an entry that no test has any more is an error. Skip without a GPU."""
    if needy := [item for item in items if item.get_closest_marker("gpu")]:
        import torch  # slow to import, and other tests may want to be the first

        if not (asks_for_gpu(config) and torch.cuda.is_available()):
            for item in needy:
                item.add_marker(pytest.mark.skip("needs a CUDA device, and `-m gpu`"))
    listed = {line for line in SLOW_TESTS.read_text().splitlines() if line and not line.startswith("#")}
    found = {item.nodeid: item for item in items}
    for name in listed & found.keys():
        found[name].add_marker("slow")
    files = {name.partition("::")[0] for name in found} if not any("::" in each for each in config.args) else ()
    if gone := sorted(name for name in listed - found.keys() if name.partition("::")[0] in files):
        raise pytest.UsageError(f"{SLOW_TESTS} lists what is no test: {gone[0]}")


@pytest.fixture(scope="session", autouse=True)
def backward_before_anything_is_compiled():
    """Run a backward pass, so that tests can fork whatever ran before them.

    CUDA builds of torch 2.11 start autograd's threads at the first backward pass if something was compiled before it,
    and a process with such threads cannot fork children that train.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].ones(1, requires_grad=True).sum().backward()


@contextmanager
def same_weights():
    """Random weights inside are the same in every session, so that no bound on a loss is met by chance."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory):
    """Folder of a Qwen3-architecture causal language model of width 16 with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("text_encoder")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    with same_weights():
        Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory):
    """Folder of an AutoencoderKL with factor 4 and 4 latent channels, with latent statistics."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("autoencoder")
    with same_weights():
        AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=32,
        ).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(latents_mean=[0.0] * 4, latents_std=[0.5] * 4)
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """Folder of three shards with 40 small pictures of varied shape and captions of known words."""
    from PIL import Image

    from shard_writer import ShardWriter

    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for number in range(40):
            height, width = random.integers(32, 64, size=2)
            pixels = np.full((height, width, 3), random.integers(0, 255, size=3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            caption = " ".join(random.choice(WORDS, size=6))
            writer.write(f"{number:05d}", {"png": file.getvalue(), "txt": caption, "json": {"number": number}})
    return folder


@pytest.fixture
def another_start():
    """Context of a run's folder that another process holds; yields its id, and kills it at the end."""
    from hdm_lightning.training import worker

    @contextmanager
    def held(folder, then=lambda: time.sleep(300)):
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with worker.alone_in(folder):
                    os.write(tell, b"x")
                    then()
            finally:
                os._exit(0)
        os.close(tell)  # so that a child that ends without a word ends the reading
        assert os.read(ready, 1) == b"x"
        try:
            yield pid
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    return held


@pytest.fixture
def free():
    """Function of a run's folder that says whether another process gets it at once."""
    from hdm_lightning.errors import UserError
    from hdm_lightning.training import worker

    def asked(folder):
        pid = os.fork()
        if pid == 0:
            try:
                worker.PATIENCE_S = 0.0
                os._exit(0 if worker.take(folder) is not None else 1)
            except UserError:
                os._exit(2)
        return {0: True, 2: False}[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

    return asked
