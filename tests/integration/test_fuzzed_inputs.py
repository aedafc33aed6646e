"""Whatever stands in files and arguments of others: it is used, or refused by a `UserError`; nothing else, and soon.

By default a part of the cases of each kind, in the slow tier all of them. A case is known by its kind and number.
"""

import json
import random
import shutil
import time
import traceback

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from composed import check_job, composed
from hdm_lightning.cli.overrides import arranged
from hdm_lightning.encoders.tokenizer import Tokenizer
from hdm_lightning.errors import UserError
from hdm_lightning.evaluation.subject import find_run
from hdm_lightning.generation.drawing import _prompts
from hdm_lightning.generation.image_files import ImageRecord, read_record, write_png
from hdm_lightning.generation.loading import LoadOptions, load_pipeline
from hdm_lightning.generation.sampling_settings import DrawingRequest, SamplingSettings
from hdm_lightning.interop import published
from hdm_lightning.interop.adapter_files import BASE, CONFIG, WEIGHTS, describe_adapter, is_adapter, read_adapter
from hdm_lightning.interop.layouts import read_release
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.training import job
from hdm_lightning.training.checkpoint_io import AtomicCheckpointIO
from hdm_lightning.training.continued import check_continued
from hdm_lightning.training.former_keys import present_keys
from hdm_lightning.training.initial_weights import load_initial_weights
from hdm_lightning.training.recorded import recorded_settings, recorded_text
from hdm_lightning.training.rewind import read_rewinds, start_point
from hdm_lightning.whole_files import file_error
from mutations import bytes_of, text_of, value_of
from toy_run import write_final

SHAPE = {"width": 16, "mlp_width": 12, "heads": 1, "head_dim": 16, "context_width": 16, "depth": 1}
NETWORK = XUTConfig(**SHAPE, decoder_blocks=1, blocks_after=1, **PUBLISHED)
LONGEST_S = 20.0
ALL = 600
tiers = pytest.mark.parametrize(
    "numbers", [range(60), pytest.param(range(60, ALL), marks=pytest.mark.slow)], ids=["some", "all"]
)
few = pytest.mark.parametrize(
    "numbers", [range(20), pytest.param(range(20, ALL), marks=pytest.mark.slow)], ids=["some", "all"]
)


def survive(kind, numbers, case):
    """Run `case(lot)` for every number: it returns, or raises UserError; returns how many were refused."""
    refused, failed = 0, []
    for number in numbers:
        lot, begin = random.Random(f"{kind} {number}"), time.process_time()
        try:
            case(lot)
        except UserError as error:
            assert str(error).strip() and "Traceback" not in str(error)
            refused += 1
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{number}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"[:400])
        if time.process_time() - begin > LONGEST_S:
            failed.append(f"{number}: took {time.process_time() - begin:.0f} s")
    assert not failed, "\n".join([kind, *failed])
    return refused


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return published.export_state_dict(XUT(NETWORK))


@pytest.fixture(scope="module")
def final(tmp_path_factory, tiny_text_encoder, tiny_autoencoder):
    """A run's final/ folder."""
    folder = tmp_path_factory.mktemp("run") / "final"
    state, training = XUT(NETWORK).state_dict(), {"name": "toy", "samples": 7}
    kept = {"training": training, "sampling": {"height": 16, "width": 16, "steps": 2, "solver": "heun", "shift": 1.5}}
    write_final(folder, tiny_text_encoder, tiny_autoencoder, state, config=NETWORK, **kept)
    return folder


@tiers
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin"])
def test_weight_files(weights, tmp_path, suffix, numbers):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".safetensors":
        save_file(weights, whole, metadata={"hdm_lightning": '{"text_encoder": {"name": "a", "layer": -1}}'})
    else:
        torch.save({"state_dict": weights}, whole, _use_new_zipfile_serialization=suffix == ".ckpt")
    content, path, network = whole.read_bytes(), tmp_path / f"broken{suffix}", XUT(NETWORK)

    def case(lot):
        path.write_bytes(bytes_of(content, lot))
        if lot.random() < 0.5:
            read_release(path)
        else:
            load_initial_weights(network, str(path))

    assert survive(suffix, numbers, case) > len(numbers) / 3


@few
def test_folders_of_models(final, tmp_path, numbers):
    files = [file.relative_to(final) for file in sorted(final.rglob("*.json"))]
    assert len(files) >= 4
    folder = shutil.copytree(final, tmp_path / "final")

    def case(lot):
        file = lot.choice(files)
        content = (final / file).read_bytes()
        changed = json.dumps(value_of(json.loads(content), lot)).encode()
        (folder / file).write_bytes(changed if lot.random() < 0.8 else bytes_of(content, lot))
        try:
            loaded = load_pipeline(folder, LoadOptions())
            settings = SamplingSettings.from_json({**loaded.sampling, "height": 8, "width": 8, "steps": 1})
            loaded.pipeline.draw(["a star"], [0], settings)
        except ValueError as error:  # what Python code that draws is told of a setting
            if not isinstance(error, UserError):
                raise UserError(str(error), where="settings") from error
            raise
        finally:
            (folder / file).write_bytes(content)

    survive("folder", numbers, case)


@tiers
def test_checkpoints(tmp_path, numbers):
    random_ = torch.Generator().manual_seed(0)

    def case(lot):
        folder = tmp_path / str(lot.random())
        for step in (2, 4):
            state = {f"network.{name}": torch.randn(5, 3, generator=random_) for name in "ab"}
            content = {"hdm": {"step": step, "batch_size": 8}, "state_dict": state}
            content["callbacks"] = {"LossGuard": {"streak": 0}}
            path = folder / f"step-{step:08d}.ckpt"
            if step == 4 and lot.random() < 0.5:
                content = value_of(content, lot)
                torch.save(content, path)
                continue
            AtomicCheckpointIO().save_checkpoint(content, path)
        if lot.random() < 0.7:
            path.write_bytes(bytes_of(path.read_bytes(), lot))
        start = start_point(folder, [])
        assert start.step in (2, 4)
        shutil.rmtree(folder)

    survive("checkpoint", numbers, case)


@tiers
def test_pictures_and_their_records(tmp_path, numbers):
    record = ImageRecord("a red star", 7, SamplingSettings(height=64, width=64), "runs/x", "0" * 64)
    write_png(tmp_path / "whole.png", torch.zeros(3, 16, 16, dtype=torch.uint8), record)
    content, path = (tmp_path / "whole.png").read_bytes(), tmp_path / "a.png"

    def case(lot):
        if lot.random() < 0.5:
            path.write_bytes(bytes_of(content, lot))
        else:
            text = PngImagePlugin.PngInfo()
            text.add_itxt("hdm-lightning", json.dumps(value_of(record.to_json(), lot)))
            Image.new("RGB", (8, 8)).save(path, pnginfo=text)
        found = read_record(path)
        assert isinstance(found.prompt, str) and 0 <= found.seed < 2**63 and isinstance(found.model, str)

    survive("record", numbers, case)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, toy_job):
    """A run's folder with its configuration, and the job that wrote it."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    folder.mkdir()
    checked = check_job(toy_job(folder))
    (folder / "config.yaml").write_text(recorded_text(checked.config))
    (folder / "01-px16" / "checkpoints").mkdir(parents=True)
    content = {"hdm": {"step": 2, "batch_size": 8}, "state_dict": {}, "callbacks": {}}
    AtomicCheckpointIO().save_checkpoint(content, folder / "01-px16" / "checkpoints" / "step-00000002.ckpt")
    return folder, checked


@few
def test_configurations_of_runs(recorded, numbers):
    folder, checked = recorded
    file = folder / "config.yaml"
    content = file.read_bytes()
    values = yaml.safe_load(content)

    def case(lot):
        changed = yaml.safe_dump(value_of(values, lot)).encode("utf-8", "replace")
        file.write_bytes(changed if lot.random() < 0.7 else bytes_of(content, lot))
        try:
            check_continued(checked.config, checked.plans)
            recorded_settings(file)
            find_run(folder)
        finally:
            file.write_bytes(content)

    survive("configuration", numbers, case)


@tiers
def test_rewinds(tmp_path, numbers):
    line = {"time": "t", "reason": "r", "step": 3, "checkpoint_step": 2, "first": 16, "end": 24, "skipped": 8}
    line |= {"suspects": ["a"], "keys": ["a", "b"], "keys_forgotten": 0}

    def case(lot):
        content = "\n".join([json.dumps(line), json.dumps(value_of(line, lot))]).encode()
        (tmp_path / "rewinds.jsonl").write_bytes(content if lot.random() < 0.5 else bytes_of(content, lot))
        start_point(tmp_path / "checkpoints", read_rewinds(tmp_path))

    survive("rewinds", numbers, case)


PARTS = ("lora_A", "lora_B", "lora_up", "lora_down", "alpha", "hada_w1_a", "hada_w2_b", "lokr_w1", "lokr_w2", "diff")
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64)


def _some_tensors(lot):
    found = {}
    for _ in range(lot.randint(0, 5)):
        layer = lot.choice(("base_model.model.", "transformer.", "lora_unet_", "")) + lot.choice(("a.b", "a_b", "x"))
        name = layer + lot.choice((".", "_", "")) + lot.choice(PARTS) + lot.choice((".weight", ""))
        shape, fill = (
            lot.choice(((2, 4), (3, 2), (2,), (), (0, 4), (2, 4, 1))),
            lot.choice((1, 1, 1, 0, float("nan"), 9e9)),
        )
        found[name] = torch.full(shape, fill).to(lot.choice(DTYPES))
    return found


@tiers
def test_adapters(tmp_path, numbers):
    down, up = "base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight"
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "rank_pattern": {"a.b": 2}, "alpha_pattern": {}}
    base = {"base": {"name": "x", "sha256": "0" * 64}, "settings": {"training": {}, "sampling": {}}}
    save_file({down: torch.ones(2, 4), up: torch.ones(3, 2)}, tmp_path / WEIGHTS)
    content = (tmp_path / WEIGHTS).read_bytes()

    def case(lot):
        for name, values in ((CONFIG, settings), (BASE, base)):
            (tmp_path / name).write_text(json.dumps(value_of(values, lot) if lot.random() < 0.4 else values))
        if lot.random() < 0.4:
            record = {"hdm_lightning_adapter": json.dumps(value_of(base, lot))}
            save_file(_some_tensors(lot), tmp_path / WEIGHTS, metadata=record)
        else:
            (tmp_path / WEIGHTS).write_bytes(bytes_of(content, lot) if lot.random() < 0.4 else content)
        path = lot.choice((tmp_path, tmp_path / WEIGHTS))
        assert is_adapter(path) in (True, False)
        describe_adapter(read_adapter(path))

    assert survive("adapter", numbers, case) < len(numbers)


@tiers
def test_prompts(tmp_path, tiny_text_encoder, numbers):
    tokenizer = Tokenizer(str(tiny_text_encoder)).bind(8)

    def case(lot):
        text = "\n".join(text_of(lot, 60) for _ in range(lot.randint(0, 5)))
        content = text.encode(lot.choice(("utf-8", "utf-8", "utf-16", "utf-32")), "surrogatepass")
        (tmp_path / "p.txt").write_bytes(content if lot.random() < 0.6 else bytes_of(content, lot))
        given = (content.decode("utf-8", "surrogateescape"),) if lot.random() < 0.3 else ()
        request = DrawingRequest(model="m", prompts=given, prompt_file=str(tmp_path / "p.txt"))
        for prompt in _prompts(request, None, lambda text: None):
            assert 1 <= tokenizer(prompt)[1] <= 8

    survive("prompts", numbers, case)


@tiers
def test_arguments_of_hydra_s_commands(numbers):
    keys = ["data.train", "name", "seed", "experiment", "stage.samples", "~callbacks", "+x.y", "optimizer.name"]
    keys += ["-m", "--cfg"]

    def case(lot):
        arguments = [
            lot.choice((f"{lot.choice(keys)}={text_of(lot, 12)}", text_of(lot, 8), lot.choice(keys)))
            for _ in range(lot.randint(0, 5))
        ]
        found = arranged(present_keys(arguments, lot.choice(("train", "train_vae", "plan", "demo"))))
        if "-m" in found:
            for override in (each for each in found if "=" in each and not each.startswith("-")):
                try:
                    OverridesParser.create().parse_override(override)
                except HydraException as error:
                    raise AssertionError(override) from error

    survive("arguments", numbers, case)


@few
def test_values_of_a_training_s_keys(toy_job, tmp_path, numbers):
    whole = toy_job(tmp_path / "run")

    def case(lot):
        try:
            config = composed(value_of(whole, lot))
        except (ValueError, TypeError, AttributeError, OmegaConfBaseException) as error:  # which Hydra would refuse
            raise UserError(str(error) or "x", where="groups") from error
        try:
            job.check_job(config)
        except OSError as error:  # of a name that is too long, which every command tells so
            raise (file_error(error) or error) from error

    survive("values", numbers, case)
