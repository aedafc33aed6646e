"""The Python of the documentation: what it imports is there, and every call gives what is taken.

What the README shows is run whole by `test_ten_lines.py`, the notebooks by `test_notebooks.py`. The other pages need
models and data of a reader's own, so that their calls are bound to the signatures and not made; the parts of
docs/callbacks.md are made.
"""

import ast
import inspect
import re
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from hdm_lightning import FlowModule

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]


def blocks():
    for page in PAGES:
        found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        yield page, found


def called(node, names):
    """What a call names, where that is an import or an attribute of one."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = called(node.value, names)
        return getattr(owner, node.attr) if inspect.isclass(owner) or inspect.ismodule(owner) else None
    return None


def bound(call, names):
    """Whether a call's arguments fit the signature of what it names; None where that is not known here."""
    target = called(call.func, names)
    if target is None or any(isinstance(each, ast.Starred) for each in call.args):
        return None
    given = {each.arg: None for each in call.keywords if each.arg}
    inspect.signature(target).bind_partial(*call.args, **given)
    return True


@pytest.mark.parametrize(("page", "found"), [pytest.param(*each, id=each[0].name) for each in blocks() if each[1]])
def test_imports_are_there_and_calls_fit(page, found):
    names, checked = {}, 0
    for block in found:  # a later block may use what an earlier one imported
        tree = ast.parse(block)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                checked += bound(node, names) is not None
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                made = called(node.value.func, names)
                made = getattr(made, "__self__", made) if inspect.ismethod(made) else made
                if inspect.isclass(made) and isinstance(node.targets[0], ast.Name):  # its methods are known then
                    names[node.targets[0].id] = made
    assert checked > 0


def test_a_call_that_does_not_fit_is_found():
    names = {"FlowModule": FlowModule}
    good, bad = (ast.parse(f"FlowModule(1, 2, 3, learning_rate{each}=1)").body[0].value for each in ("", "s"))
    assert bound(good, names)
    with pytest.raises(TypeError, match="learning_rates"):
        bound(bad, names)


def parts():
    """The statements of each block under the heading "Three lines each" of docs/callbacks.md."""
    shown = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8").partition("\n## Three lines each\n")[2]
    for block in re.findall(r"^```python\n(.*?)^```", shown, re.MULTILINE | re.DOTALL):
        yield ast.parse(block).body


def test_the_parts_for_any_trainer_are_made_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = list(parts())
    assert len(rows) >= 15
    names = {"L": L, "CSVLogger": CSVLogger, "module": FlowModule.__new__(FlowModule)}
    for *making, use in rows:
        exec(compile(ast.Module(making, []), "docs/callbacks.md", "exec"), names)
        calls = [node for node in ast.walk(use) if isinstance(node, ast.Call)]
        assert calls and all(bound(call, names) for call in calls)
