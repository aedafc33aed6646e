"""Every command of the documentation, the notebooks and the configuration's headers is one that its program takes.

Commands of Hydra are composed, those of argparse parsed: as they stand most take hours, a GPU or the reader's data.
What the programs do is tested at toy size, each in the folder or file that `RUN_IN` names. What other programs do is
listed with why it is not run here.
A block without a language holds commands and nothing else; whatever else is shown has its language, or `text`.
"""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep

from hdm_lightning.app import serve
from hdm_lightning.cli import bench, challenge, convert, evaluate, evaluate_recorded, sample, shards
from hdm_lightning.cli.explained import explain
from hdm_lightning.cli.overrides import EXPLAIN, composed
from hdm_lightning.training.former_keys import present_keys

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("*.md"))
PAGES += [
    page for room in ("docs", "experiments", "integrations", "data") for page in sorted((ROOT / room).rglob("*.md"))
]
PAGES += sorted((ROOT / "notebooks").glob("*.ipynb"))
CONF = sorted((ROOT / "conf").rglob("*.yaml"))
HYDRA = {"hdm-train": "train", "hdm-train-vae": "train_vae", "hdm-plan": "plan", "hdm-demo": "demo"}
RUN_IN = {
    "hdm-train": "integration/test_training.py",
    "hdm-train-vae": "integration/test_vae_training.py",
    "hdm-plan": "integration/test_plan_command.py",
    "hdm-demo": "integration/test_demo.py",
    "hdm-sample": "integration/test_sample_command.py",
    "hdm-evaluate": "integration/test_evaluate_command.py",
    "hdm-shards": "unit/data/test_shards_command.py",
    "hdm-convert": "integration/test_convert.py",
    "hdm-bench": "integration/test_bench_command.py",
    "hdm-app": "browser",
    "hdm-challenge": "integration/test_challenge.py",
}
"""Where each of our programs is run."""

NOT_RUN = {
    "pip": "fetches packages",
    "uv": "fetches packages",
    "apt-get": "fetches packages",
    "python3": "makes an environment",
    "cd": "of the shell",
    "source": "of the shell",
    "export": "of the shell",
    "cp": "of the shell",
    "ln": "of the shell",
    "mkdir": "of the shell",
    "[": "of the shell",
    "scontrol": "needs several machines",
    "hf": "fetches models",
    "img2dataset": "fetches images",
    "sed": "edits a file that was fetched",
    "docker": "needs its daemon",
    "tensorboard": "serves until it is stopped",
    "torchrun": "needs several machines",
    "srun": "needs several machines",
}
OF_PLUGINS = re.compile(r"hydra/|hydra\.(?:launcher|sweeper)\.|hparams_search=|\S+=tag\(")
"""Keys and values that an extra brings (hdm-lightning[sweeps], [slurm])."""
FLAGS_OF_HYDRA = {"--cfg", "job", "-m", "--multirun", "--help"}


def markdown(page):
    """The text of a page, or of a notebook's cells that are no code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def parts(text):
    """(language, content) of every fenced block, and (None, content) of what is between them."""
    language, lines = None, []
    for line in text.splitlines():
        fence = re.match(r"```(\w*)", line)
        if fence is None:
            lines.append(line)
            continue
        yield language, "\n".join(lines)
        language, lines = (fence[1] if language is None else None), []
    assert language is None, "a block has no end"
    yield None, "\n".join(lines)


def blocks(text):
    """The lines of blocks of commands, continued ones joined."""
    for language, content in parts(text):
        if language in ("", "bash", "sh"):
            yield from content.replace("\\\n", " ").splitlines()


def inline(text):
    """Whole commands in the middle of a sentence: they give a path, a value or a number, and have no gap to fill in."""
    prose = "\n".join(content for language, content in parts(text) if language is None)
    for command in re.findall(r"`((?:hdm-[a-z-]+|make|pip install) [^`]+)`", prose):
        if "…" not in command and (re.search(r"[/=]|\s\d", command) or not command.startswith("hdm-")):
            yield " ".join(command.split())


def headers(text):
    """The commands in a configuration file's comments, with what is indented below them."""
    lines = [line[1:] for line in text.splitlines() if line.startswith("#")]
    for number, line in enumerate(lines):
        if re.match(r" {3}hdm-", line):
            more = [each.strip() for each in lines[number + 1 : number + 2] if each.startswith(" " * 5)]
            yield " ".join([line.strip().rstrip("\\"), *more])


def documented():
    """Place and words of every command that is not in a comment and that has no gap to fill in."""
    found = [(page, line) for page in PAGES for way in (blocks, inline) for line in way(markdown(page))]
    for page in CONF:
        found += [(page, re.split(r" {2,}", line)[0]) for line in headers(page.read_text(encoding="utf-8"))]
    for page, line in found:
        for part in re.split(r" && | \| ", line.strip()):
            words = [word for word in shlex.split(part, comments=True) if word != "…"]
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                del words[0]
            if words:
                yield pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:70]}")


def composes(program, words):
    """Compose as the command does; of a sweep the first job."""
    name = HYDRA[program]
    if words[:1] == ["autoencoder"] and name == "plan":
        name, words = "plan_autoencoder", words[1:]
    if EXPLAIN in words:
        assert explain([word for word in words if word != EXPLAIN], name)
        return
    overrides = []
    for text in present_keys([word for word in words if word not in FLAGS_OF_HYDRA], name):
        if OF_PLUGINS.match(text):
            continue
        (override,) = OverridesParser.create().parse_overrides([text])
        if not override.is_sweep_override():
            overrides.append(text)
        elif isinstance(override.value(), ChoiceSweep):
            overrides.append(f"{override.get_key_element()}={next(override.sweep_string_iterator())}")
    composed(name, overrides)


def parses(program, words):
    """Let the command's own parser read the words."""
    if program == "hdm-sample":
        _, unknown = sample.parser().parse_known_intermixed_args(words)
        assert not unknown
    elif program == "hdm-evaluate" and words[:1] and words[0] in evaluate.OTHERS:
        evaluate_recorded.read(words[0], words[1:])
    elif program == "hdm-evaluate":
        vae = words[:1] == ["vae"]
        (evaluate._vae_parser() if vae else evaluate._model_parser()).parse_args(words[vae:])
    elif program == "hdm-shards":
        shards.read(words)
    else:
        others = {"hdm-convert": convert, "hdm-bench": bench, "hdm-app": serve, "hdm-challenge": challenge}
        others[program].parser().parse_args(words)


def installs(words):
    """The extras that are named are those of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {
        extra
        for word in words
        for named in re.findall(r"(?:^\.|hdm-lightning)\[(.+)\]", word)
        for extra in named.split(",")
    }
    assert extras <= set(setup["options.extras_require"])


def test_each_program_is_run_somewhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = re.findall(r"^(hdm-[a-z-]+) *=", setup["options.entry_points"]["console_scripts"], re.MULTILINE)
    assert set(scripts) == set(RUN_IN)
    for place in RUN_IN.values():
        tests = ROOT / "tests" / place
        text = "".join(each.read_text() for each in (tests.glob("*.py") if tests.is_dir() else [tests]))
        assert "def test_" in text


@pytest.mark.parametrize("words", documented())
def test_a_documented_command_is_understood(words):
    program, *rest = words
    if program in HYDRA:
        composes(program, rest)
    elif program.startswith("hdm-"):
        parses(program, rest)
    elif program == "make":
        targets = {word for word in rest if "=" not in word}
        made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert targets <= made
    elif program in ("python", "git"):
        assert program == "git" or rest[0] == "-m" or (ROOT / rest[0]).is_file()
    elif Path(program).name == "pip":
        installs(rest)
    else:
        assert program in NOT_RUN


def test_blocks_are_told_from_what_is_between_them():
    text = "`make docs`\n```python\nx = `1`\n```\nprose\n```\nhdm-demo\nhdm-plan \\\n  a=1\n```\n```text\nnone\n```\n"
    assert [line.split() for line in blocks(text)] == [["hdm-demo"], ["hdm-plan", "a=1"]]
    assert list(inline(text)) == ["make docs"]
