"""What builders and other commands leave beside their shards, damaged as disks and editors do it.

The same command again goes on, with every sample there, or says what is wrong with which file. Each case follows from
its number.
"""

import json
import random
import shutil
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hdm_lightning.data.index import load_index
from hdm_lightning.data.scanning import index_shards, note_scanned
from hdm_lightning.data.text_states import TextFormat
from hdm_lightning.datasets.caption_states import EncodedCaptions, StateOptions
from hdm_lightning.datasets.captioning import CaptionedSet, CaptionOptions
from hdm_lightning.datasets.filter_judging import Filter
from hdm_lightning.datasets.filter_rules import Rule
from hdm_lightning.datasets.filtering import FilteredSet
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.datasets.parquet import ParquetTable
from hdm_lightning.datasets.rows import Columns, build_rows
from hdm_lightning.errors import UserError
from mutations import bytes_of, value_of

SAMPLES = 6
numbers = pytest.mark.parametrize(
    "numbers", [range(60), pytest.param(range(60, 600), marks=pytest.mark.slow)], ids=["some", "all"]
)


def start_captions(device):
    return lambda images, prompt: [(f"{prompt} {image.getpixel((0, 0))[0]}", False) for image in images]


def start_states(device):
    return lambda tokens, lengths: torch.ones(*tokens.shape, 4)


@pytest.fixture(scope="module")
def commands(kit, tmp_path_factory):
    """Functions of the folder that a command writes into, by the command's name; each returns its samples."""
    root = tmp_path_factory.mktemp("sources")
    (root / "in").mkdir()
    for number in range(SAMPLES):
        (root / "in" / f"{number}.png").write_bytes(kit.coloured(number))
        (root / "in" / f"{number}.txt").write_text(f"number {number}")
    columns = {"image": [kit.coloured(n) for n in range(SAMPLES)], "text": [f"number {n}" for n in range(SAMPLES)]}
    pq.write_table(pa.table(columns), root / "t.parquet")
    shards, table = kit.write_shards(root / "shards", [4, 2]), Columns("image", ("text",))
    described = CaptionOptions(start_captions, "m", "f", {"long": "p"}, batch_size=2)
    form = TextFormat("0" * 64, 4, "float16", (8,), "name")
    encoded = StateOptions(start_states, [lambda text: ([ord(letter) for letter in text][:8], len(text[:8]))], 64)

    def rows(out):
        return build_rows(ParquetTable([str(root / "t.parquet")], table), out, table, samples_per_shard=2, threads=1)

    def index(out):
        if not (out / "000.tar").exists():
            shutil.copytree(shards, out, dirs_exist_ok=True)
        index_shards(out, new_only=True)
        for record in load_index(out).shards:  # as a call that was ended would have left it
            note_scanned(out, record)

    return {
        "folder": lambda out: build_folder(root / "in", out, samples_per_shard=2, processes=1),
        "rows": rows,
        "caption": lambda out: CaptionedSet(str(shards), out, described).make(),
        "filter": lambda out: FilteredSet(str(shards), Filter((Rule("width", least=1),)), jobs=1).write(out),
        "states": lambda out: EncodedCaptions(str(shards), out, form, encoded).make(),
        "index": index,
    }


SAID = {"first": 0, "said": [{"said": {"long": "p 0"}, "cut": [], "faults": []}] * 2}
"""A line of what a call that was ended has noted of a shard."""


def damaged(folder, name, lot):
    """Damage one of the files beside the shards; now and then a shard or the index is lacking, too."""
    if name == "caption" and lot.random() < 0.5:
        (folder / ".000.tar.captions.jsonl").write_text(json.dumps(value_of(SAID, lot)) + "\n")
        (folder / "000.tar").unlink()
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix != ".tar")
    file = lot.choice(files)
    content = file.read_bytes()
    parts = {".json": [content], ".jsonl": content.splitlines()}.get(file.suffix, [])
    if parts and lot.random() < 0.6:
        number = lot.randrange(len(parts))
        parts[number] = json.dumps(value_of(json.loads(parts[number]), lot)).encode()
        file.write_bytes(b"\n".join(parts) + b"\n")
    else:
        file.write_bytes(bytes_of(content, lot))
    for each in (*folder.glob("*.tar"), *folder.glob("index.json")):
        if lot.random() < 0.2 and name != "index":
            each.unlink()


@numbers
@pytest.mark.parametrize("name", ["folder", "rows", "caption", "filter", "states", "index"])
def test_a_command_goes_on_over_damaged_files_of_its_own_or_names_them(kit, commands, tmp_path, name, numbers):
    whole, make, failed, went_on = tmp_path / "whole", commands[name], [], 0
    make(whole)
    for number in numbers:
        lot, folder = random.Random(f"{name} {number}"), tmp_path / "out"
        shutil.copytree(whole, folder)
        damaged(folder, name, lot)
        try:
            make(folder)
            went_on += 1
            if name != "states":
                there = load_index(folder).samples
                assert there == SAMPLES, f"{there} samples"
        except UserError as error:
            assert str(error).strip()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{number}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"[:300])
        shutil.rmtree(folder)
    assert not failed, "\n".join(failed)
    assert went_on > len(numbers) / 8
