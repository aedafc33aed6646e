"""Overrides on the command line: a hint is what they should have been, flags stand anywhere, names are short."""

import random
import shlex
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from hdm_lightning.cli.hydra_app import run_hydra
from hdm_lightning.cli.overrides import EXCLUDED, LONGEST_FOLDER_NAME, MODES, SUBDIR, arranged, short_name, unparsable
from hdm_lightning.errors import UserError
from hdm_lightning.training.former_keys import present_keys

LETTERS = "ab=()[]{}#'\"&;!é赤~ \\:,./%@*?|<>\t🦊^$`+-"


def values(count):
    """Texts that folders might be named."""
    lot = random.Random(0)
    found = ["a=b", "pics (2)", "brack[1]", "#1", "it's", "a&b", "!", "~/shards", "赤い", "ck/e=1-s=2.ckpt"]
    while len(found) < count:
        value = "".join(lot.choice(LETTERS) for _ in range(lot.randint(1, 12))).strip()
        if value and "${" not in value:
            found.append(value)
    return found


def test_the_hint_of_an_override_that_cannot_be_parsed_is_one_that_means_what_was_meant(capsys, monkeypatch):
    """Followed word for word: pasted to a shell and parsed by Hydra."""
    parser, refused = OverridesParser.create(), 0
    for value in values(500):
        given = f"data.train={value}"
        try:
            parser.parse_override(given)
        except Exception:
            error = unparsable(given)
            (pasted,) = shlex.split(error.hint)
            assert error.where == given
            assert parser.parse_override(pasted).value() == value
            refused += 1
    assert refused > 250
    (pasted,) = shlex.split(unparsable("train=[experiment=demo, model.width=32,5,say: it]").hint)
    assert parser.parse_override(pasted).value() == ["experiment=demo", "model.width=32", 5, "say: it"]
    for given in ("data.train=pics (2)", "data.train=a=b=c(", "=", "(", "seed=choice(1,2"):
        monkeypatch.setattr(sys, "argv", ["hdm-train", given])
        assert run_hydra(lambda config: None, "train") == 2
        told = capsys.readouterr().err
        assert "hint:" in told and "Traceback" not in told and "hydra.cc" not in told


@pytest.mark.parametrize("argument", ["seed=", "data.captions.kinds={txt:", "-m seed=1,"])
def test_numbers_that_python_does_not_read_are_refused_by_name(argument):
    with pytest.raises(UserError, match="thousands of digits") as caught:
        arranged((argument + "1" * 5000).split(" "))
    assert len(caught.value.where) <= 60


def test_flags_stand_anywhere():
    lot = random.Random(0)
    overrides = ["seed=0,1", "data.train=x", "~callbacks.guard"]
    flags = [["-m"], ["--config-dir", "here"], ["--config-name", "train"]]
    for _ in range(50):
        mixed = [[each] for each in overrides] + flags
        lot.shuffle(mixed)
        found = arranged([word for words in mixed for word in words])
        first = len([word for words in flags for word in words])
        assert sorted(found[:first]) == sorted(word for words in flags for word in words)
        assert found.index("here") == found.index("--config-dir") + 1
        assert [each for each in found[first:] if each in overrides] == [e[0] for e in mixed if e[0] in overrides]


@pytest.mark.parametrize("first", ["-m", "--multirun", "--info", "--cfg=job", "-c"])
@pytest.mark.parametrize("second", ["--cfg", "--info=all", "--run"])
def test_flags_that_contradict_each_other_are_named_and_the_hint_helps(first, second):
    given = {"-c": ["-c", "job"], "--cfg": ["--cfg", "job"]}
    arguments = [*given.get(first, [first]), "seed=0,1", *given.get(second, [second])]
    if MODES[first.partition("=")[0]] == MODES[second.partition("=")[0]]:
        assert arranged(arguments)
        return
    with pytest.raises(UserError) as caught:
        arranged(arguments)
    for left_out in caught.value.hint.removeprefix("omit ").split(" or "):
        flags = {flag for flag, mode in MODES.items() if mode == left_out}
        kept = [each for each in arguments if each.partition("=")[0] not in flags and each != "job"]
        assert arranged(kept)


def test_jobs_are_named_by_what_differs_and_other_sweeps_by_another_name():
    fixed = ["data.train=x", "validation.samples=16", "hardware.threads=1", "guard.rewinds=0", "validation.seed=1"]
    found = arranged(["-m", *fixed, "seed=0,1"])
    excluded = next(each for each in found if each.startswith(EXCLUDED))
    assert all(f'"{each.partition("=")[0]}"' in excluded for each in fixed) and '"seed"' not in excluded
    assert arranged(["-m", *fixed[::-1], "seed=0,1"])[-1] == found[-1]
    assert arranged(["-m", *fixed[1:], "seed=0,1"])[-1] != found[-1]
    assert arranged(["-m", "seed=0,1"]) == ["-m", "seed=0,1"]
    assert arranged([*fixed, "seed=0"]) == [*fixed, "seed=0"]
    assert arranged(["-m", *fixed, "seed=0,1", f"{SUBDIR}=mine"])[-1] == f"{SUBDIR}=mine"


def test_names_in_any_script_fit_a_file_system():
    lot = random.Random(0)
    names = {"".join(chr(lot.randint(0x4E00, 0x9FFF)) for _ in range(lot.randint(1, 300))) for _ in range(500)}
    folders = {short_name(name) for name in names}
    assert len(folders) == len(names)
    assert max(len(folder.encode()) for folder in folders) <= LONGEST_FOLDER_NAME


@pytest.mark.parametrize(
    ("config", "given", "hint"),
    [
        ("train", "experiment=eqvae_paper", "hdm-train-vae experiment_vae=eqvae_paper"),
        ("train", "experiment_vae=eqvae_paper", "hdm-train-vae experiment_vae=eqvae_paper"),
        ("train_vae", "experiment=eqvae_paper", "experiment_vae=eqvae_paper"),
        ("train_vae", "experiment=openclipart_cpu", "hdm-train experiment=openclipart_cpu"),
        ("plan", "experiment=eqvae_paper", "hdm-plan autoencoder experiment_vae=eqvae_paper"),
        ("plan_autoencoder", "+experiment=paper_small", "hdm-plan experiment=paper_small"),
    ],
)
def test_an_experiment_of_the_other_training_is_sent_to_its_command(config, given, hint):
    with pytest.raises(UserError) as caught:
        present_keys([given], config)
    assert caught.value.hint == hint
    assert present_keys(["experiment=paper_small"], "train") == ["experiment=paper_small"]
    assert present_keys(["experiment_vae=eqvae_paper"], "train_vae") == ["experiment_vae=eqvae_paper"]
    assert present_keys(["experiment=nothing_like_it"], "train") == ["experiment=nothing_like_it"]


@pytest.mark.parametrize("value", ["null", "1", "0.5", "true", "nan", "[csv,null]", "[1]", "csv,null"])
@pytest.mark.parametrize("group", ["logger", "callbacks", "model", "experiment", "hydra/launcher", "+debug"])
def test_a_group_takes_names_of_its_files_and_nothing_else(group, value):
    """Hydra itself ends in a stack trace where it is given null, as others write it: callbacks=null."""
    with pytest.raises(UserError) as caught:
        arranged(["-m", f"{group}={value}"])
    assert caught.value.where == group.lstrip("+")
    if group in ("logger", "callbacks"):
        assert caught.value.hint == f"{group}=none"
        arranged([caught.value.hint])  # as it says


@pytest.mark.parametrize(
    "override",
    [
        *("logger=csv", "logger=[csv,tensorboard]", "logger=csv,wandb", "~logger", "model='xut_tiny'", "seed=null"),
        *("logger.tensorboard=null", "callbacks.progress=null", "init=null", "model={a: 1}", "logger=", "name=1"),
        *(
            "optimizer=glob(*)",
            "optimizer=glob([a*,m*],exclude=muon)",
            'logger="csv","wandb"',
            "logger=choice(csv,wandb)",
        ),
    ],
)
def test_other_overrides_pass(override):
    assert override in arranged([override])
