"""The room of the networks imports nothing beyond torch, YAML for its presets and itself, and can be compiled."""

import ast
import sys
from pathlib import Path

import hdm_lightning.models

FILES = sorted(Path(hdm_lightning.models.__file__).parent.glob("*.py"))


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            names.add(node.module or "")
    return names


def test_models_import_torch_yaml_and_themselves_only() -> None:
    assert len(FILES) > 10
    for file in FILES:
        for name in imported(file):
            root = name.split(".")[0]
            own = name.startswith("hdm_lightning.models")
            assert own or root in ("torch", "yaml") or root in sys.stdlib_module_names, f"{file.name} imports {name}"


UNTRACEABLE = (
    "torch.amp",
    "torch.cuda",
    "torch.backends",
    "torch.distributed",
    "torch.Generator",
    "torch.allclose",
    "torch.can_cast",
    "torch.clear_autocast_cache",
    "torch.equal",
    "torch.get_float32_matmul_precision",
    "torch.get_num_threads",
    "torch.get_rng_state",
    "torch.initial_seed",
    "torch.is_inference_mode_enabled",
    "torch.manual_seed",
    "torch.result_type",
    "gc",
    "logging",
    "print",
    "random",
    "time",
    "warnings",
)
"""Functions, and modules of functions, that the compiler of torch 2.11 does not trace into a graph; it was asked for
each. Some of them later releases trace, so that a test of the installed one does not notice them."""
READ_BY_THE_HOST = {"data_ptr", "is_pinned", "item", "numpy", "tolist", "untyped_storage"}
"""Methods of a tensor that break a graph or wait for the device."""
MAY_READ = {"inputs.py"}
"""Checks of values, which are left out where the compiler or an accelerator would mind."""


def called(source: str) -> set[str]:
    """What a source calls: dotted names with imports resolved, and `.name` for methods of whatever object."""
    tree, origin = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origin |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            origin |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            names.add(origin.get(first, first) + dot + rest)
            if isinstance(node.func, ast.Attribute):
                names.add(f".{node.func.attr}")
    return names


def untraceable(source: str, *, reads: bool = False) -> set[str]:
    """Calls of a source that the compiler does not trace, those that read a tensor too unless ``reads``."""
    names = called(source)
    found = {name for name in names if any(name == each or name.startswith(f"{each}.") for each in UNTRACEABLE)}
    return found if reads else found | {name for name in names if name[1:] in READ_BY_THE_HOST and name[0] == "."}


def test_nothing_in_models_breaks_a_graph_of_any_release() -> None:
    for file in FILES:
        assert not untraceable(file.read_text(encoding="utf-8"), reads=file.name in MAY_READ), file.name


def test_calls_that_break_a_graph_are_seen_under_any_name() -> None:
    source = """
import torch as t
from torch.amp import is_autocast_available as has_autocast
from warnings import warn
has_autocast(kind) or t.cuda.is_available() or warn("no") or tensor.sum().item() or t.autocast(kind, enabled=False)
"""
    expected = {"torch.amp.is_autocast_available", "torch.cuda.is_available", "warnings.warn", ".item"}
    assert untraceable(source) == expected
    assert untraceable(source, reads=True) == expected - {".item"}
