"""The room of the networks imports nothing beyond torch, YAML for its presets, the standard library and itself."""

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
