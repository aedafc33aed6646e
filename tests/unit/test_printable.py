"""Nothing that others wrote steers the terminal, by whichever command it gets there."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hdm_lightning.cli import convert, sample, shards
from hdm_lightning.cli.command import run_command
from hdm_lightning.data.scanning import index_shards
from hdm_lightning.errors import UserError
from hdm_lightning.interop import published
from hdm_lightning.models import PUBLISHED, XUT, XUTConfig
from hdm_lightning.printable import in_one_line, printable
from hdm_lightning.training.initial_weights import InitReport

EVIL = "a\x1b]0;owned\x07\x1b[2J\x9b31m\r\n0 problems\x00\u202eb"
FORBIDDEN = set(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E, 0x2028]))


def test_every_control_character_is_spelled():
    everything = "".join(map(chr, range(0x3000)))
    assert not FORBIDDEN & set(printable(everything))
    assert printable("\x1b[2J\x7f\x9b\r") == "\\x1b[2J\\x7f\\x9b\\r"
    assert printable("größe 大 👩‍🚀\n\tx") == "größe 大 👩‍🚀\n\tx"
    assert in_one_line("a\nb\tc") == "a\\nb\\tc"
    printable("name\udcff.png").encode()


def test_a_users_error_is_printed_without(capsys):
    def command():
        raise UserError(f"no tensor {EVIL}", where=f"/tmp/{EVIL}", hint=f"delete {EVIL}")

    assert run_command(command) == 2
    said = capsys.readouterr().err
    assert not FORBIDDEN & set(said) and "\\x1b[2J" in said
    first = said.splitlines()[0]
    assert first.startswith("error: /tmp/a\\x1b") and "\\r\\n0 problems\\x00\\u202eb: no tensor a" in first


def test_keys_of_a_shard(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in ((f"{EVIL.replace(chr(0), '')}.png", png()), ("b.png", png())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index_shards(tmp_path)
    shards.main(["verify", "--decode", str(tmp_path)])
    shards.main(["stats", str(tmp_path)])
    shards.main(["index", str(tmp_path)])
    said = capsys.readouterr()
    assert not FORBIDDEN & set(said.out)
    assert "0 problems" not in said.out.splitlines()
    assert "\\x1b[2J" in said.out  # the name was told


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_names_of_tensors(tmp_path, capsys):
    torch.manual_seed(0)
    config = XUTConfig(
        channels=4, patch_size=1, width=32, mlp_width=48, heads=2, head_dim=16, context_width=16, depth=1,
        decoder_blocks=1, **PUBLISHED,
    )  # fmt: skip
    tensors = published.export_state_dict(XUT(config))
    save_file({**tensors, f"other.{EVIL}": torch.zeros(1)}, tmp_path / "a.safetensors")
    convert.main([str(tmp_path / "a.safetensors")])
    said = capsys.readouterr()
    assert "\\x1b" in said.err + said.out and "\n0 problems" not in said.err + said.out
    assert not FORBIDDEN & set(said.err + said.out)
    assert not FORBIDDEN & set(str(InitReport("a", [], [EVIL], [EVIL], [EVIL], [])))


def test_the_record_of_a_picture(tmp_path, capsys):
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_itxt("hdm-lightning", json.dumps({"format": EVIL, "model": EVIL}))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    assert sample.main(["--repeat", str(tmp_path / "a.png"), str(tmp_path / "nowhere")]) == 2
    assert not FORBIDDEN & set(capsys.readouterr().err)


@pytest.mark.parametrize("place", ["where", "hint"])
def test_the_parts_of_an_error_stay_as_they_are_for_programs(place):
    error = UserError("what", **{place: EVIL})
    assert getattr(error, place) == EVIL
    assert not FORBIDDEN & set(str(error))
