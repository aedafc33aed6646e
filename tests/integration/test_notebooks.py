"""The notebooks run from their first cell to their last, at the size of a test, and are kept without outputs."""

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {"SCENES": 64, "AUTOENCODER_SAMPLES": 64, "MODEL_STEPS": 4}


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path, changes, folder):
    """Run the code cells in a folder, with other values of the parameters; what each cell ends with, and all names."""
    names, shown = {}, []
    for cell in cells(path):
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"])
        for name, value in changes.items() if "parameters" in cell["metadata"].get("tags", ()) else ():
            code, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.MULTILINE)
            assert count == 1, name
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(path), "exec"), names)
        shown.append(eval(compile(ast.Expression(last.value), str(path), "eval"), names) if last else None)
    return shown, names


def test_they_are_kept_without_outputs():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
        assert code[0]["metadata"]["tags"] == ["parameters"]


@pytest.mark.slow
def test_they_train_and_draw(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    shown, names = run(FOLDER / "small_training.ipynb", SMALL, tmp_path)
    assert names["trainer"].global_step == SMALL["MODEL_STEPS"]
    assert names["trainer"].callback_metrics["val/loss_ema_8k"].isfinite()
    assert sum(isinstance(each, Image.Image) for each in shown) == 2

    drawn, names = run(FOLDER / "sampling.ipynb", {"MODEL": "../runs/notebook/model", "STEPS": 2}, tmp_path)
    sheets = [each for each in drawn if isinstance(each, Image.Image)]
    assert len(sheets) == 5 and all(sheet.getextrema() != ((255, 255),) * 3 for sheet in sheets)
    once, again = names["generate"]("a red ring", seed=3), names["generate"]("a red ring", seed=3)
    assert once[0].tobytes() == again[0].tobytes()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_their_links_lead_somewhere(path):
    text = "".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (FOLDER / target).exists(), target
