"""What builders and other commands leave beside their shards, and tables, damaged as disks and editors do it.

A command goes on, with every sample there or named, or says what is wrong with which file. Each case follows from its
number.
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
from hdm_lightning.data.inspection import collect
from hdm_lightning.data.samples import stream
from hdm_lightning.data.scanning import index_shards, note_scanned
from hdm_lightning.data.text_states import TextFormat, TextStates, read_format
from hdm_lightning.data.verification import verify
from hdm_lightning.datasets.caption_states import EncodedCaptions, StateOptions
from hdm_lightning.datasets.captioning import CaptionedSet, CaptionOptions
from hdm_lightning.datasets.filter_rules import Filter, Rule
from hdm_lightning.datasets.filtering import FilteredSet
from hdm_lightning.datasets.folder import build_folder
from hdm_lightning.datasets.parquet import ParquetTable
from hdm_lightning.datasets.rows import Columns, build_rows
from hdm_lightning.datasets.shard_work import is_begun
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
    kit.write_images(root / "in", {str(n): f"number {n}" for n in range(SAMPLES)})
    columns = {"image": [kit.coloured(n) for n in range(SAMPLES)], "text": [f"number {n}" for n in range(SAMPLES)]}
    pq.write_table(pa.table(columns), root / "t.parquet")
    shards, table = kit.write_shards(root / "shards", [4, 2]), Columns("image", ("text",))
    described = CaptionOptions(start_captions, "m", "f", {"long": "p"}, batch_size=2)
    form = TextFormat("0" * 64, 4, "float16", (8,), "name")
    encoded = StateOptions(start_states, [lambda text: ([ord(letter) for letter in text][:8], len(text[:8]))], 64)

    def rows(out):
        return build_rows(ParquetTable([str(root / "t.parquet")], table), out, samples_per_shard=2, threads=1)

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


def survived(name, numbers, case):
    """Run `case(lot)` for every number, which returns or raises UserError; returns how many returned."""
    failed, well = [], 0
    for number in numbers:
        try:
            case(random.Random(f"{name} {number}"))
            well += 1
        except UserError as error:
            assert str(error).strip()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{number}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"[:300])
    assert not failed, "\n".join([name, *failed])
    return well


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda out: index_shards(out), "latents.json"),
        (lambda out: is_begun(out / "latents.json", lambda found: True, "others"), "latents.json"),
        (lambda out: read_format(out, where="data.text_states"), "text_states.json"),
    ],
)
def test_brackets_without_end_in_what_describes_a_set_are_a_message(kit, tmp_path, read, name):
    kit.write_shards(tmp_path, [1])
    (tmp_path / name).write_text('{"a": ' * 100_000)
    with pytest.raises(UserError):
        read(tmp_path)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("kind", ["*.states.npy", "*.found.npy", "table.npy", "pieces.json"])
def test_text_states_are_whole_again_once_a_damaged_file_is_deleted(commands, tmp_path, kind, damage):
    """As the message says that names it."""
    make, tokens = commands["states"], torch.tensor([list(b"number 5")])
    count = make(tmp_path)
    file = sorted(tmp_path.glob(kind))[-1]
    damage(file)

    def read():
        assert make(tmp_path) == count
        states = TextStates(tmp_path).context(tokens, torch.tensor([8]), torch.ones(1), ["number 5"])
        assert torch.equal(states, torch.ones(1, 8, 4, dtype=torch.float16))

    try:
        read()
    except UserError as error:
        assert str(file) in str(error)
        file.unlink()
        read()


@numbers
@pytest.mark.parametrize("name", ["folder", "rows", "caption", "filter", "states", "index"])
def test_a_command_goes_on_over_damaged_files_of_its_own_or_names_them(commands, tmp_path, name, numbers):
    whole, make, out = tmp_path / "whole", commands[name], tmp_path / "out"
    make(whole)

    def case(lot):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        damaged(out, name, lot)
        make(out)
        assert name == "states" or load_index(out).samples == SAMPLES

    assert survived(name, numbers, case) > len(numbers) / 8


@numbers
def test_an_index_that_is_damaged_is_refused_or_read(kit, tmp_path, numbers):
    folder = kit.write_shards(tmp_path / "set", [4, 2])
    file = folder / "index.json"
    content = file.read_bytes()

    def case(lot):
        changed = json.dumps(value_of(json.loads(content), lot)).encode()
        file.write_bytes(changed if lot.random() < 0.6 else bytes_of(content, lot))
        list(verify(folder, decode=True))
        collect([str(folder)])
        list(stream(kit.stream_config(folder), kit.letters, stop=SAMPLES))

    survived("index", numbers, case)
    file.write_bytes(json.dumps({**json.loads(content), "shards": []}).encode())
    with pytest.raises(UserError, match="empty"):
        collect([str(folder)])


CELLS = {
    "bytes": [b"", b"x", None],
    "text": ["a red star", "", "\x1b[2J\u202e", "x" * 70_000, None],
    "texts": [["a", "b"], [], [None], None],
    "number": [0, -1, 2**62, None],
    "fraction": [float("nan"), 1e308, None],
    "struct": [{"bytes": None, "path": "/etc/hostname"}, {"bytes": b"", "path": None}, None],
}


@numbers
def test_tables_of_all_kinds_have_every_row_used_or_named(kit, tmp_path, numbers):
    columns, file = Columns("image", ("text",)), tmp_path / "t.parquet"
    good = {"image": [kit.coloured(n) for n in range(SAMPLES)], "text": [f"number {n}" for n in range(SAMPLES)]}
    pq.write_table(pa.table(good), file, row_group_size=2)
    content = file.read_bytes()

    def case(lot):
        out, rows = tmp_path / "out", None
        shutil.rmtree(out, ignore_errors=True)
        if lot.random() < 0.5:
            file.write_bytes(bytes_of(content, lot))
        else:
            kinds = ("bytes", "bytes", "struct", "text"), ("text", "text", *CELLS), (*CELLS,)
            names = ("image", "text", lot.choice(("score", "source", "caption", "\x1b[2J")))
            picked = {name: CELLS[lot.choice(each)] for name, each in zip(names, kinds, strict=True)}
            rows = lot.randint(1, 5)
            table = {name: [lot.choice(cells) for _ in range(rows)] for name, cells in picked.items()}
            if picked["image"] is CELLS["bytes"]:
                table["image"][0] = kit.coloured(1)
            pq.write_table(pa.table(table), file)
        report = build_rows(ParquetTable([str(file)], columns), out, threads=1, allow_missing=lot.random() < 0.5)
        assert report.samples + len(report.rejected) == (rows or SAMPLES)

    assert survived("table", numbers, case) > len(numbers) / 20
