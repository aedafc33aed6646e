"""The files of the package: no cycle among them, and each name once."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import hdm_lightning

LINES = 4
"""Of a function's body, below which two may be alike."""
PACKAGE = Path(hdm_lightning.__file__).parent
FILES = {
    ".".join(("hdm_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)): file
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
}


def imported(name: str) -> set[str]:
    """The files of the package that a file imports, wherever in it and for whatever reason."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


def test_no_file_needs_itself() -> None:
    graph = {name: imported(name) for name in FILES}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # raises with the cycle


def test_each_name_stands_once() -> None:
    names = Counter(name.rpartition(".")[2] for name in FILES)
    assert [name for name, count in names.items() if count > 1] == []


def test_each_error_of_a_user_has_a_hint() -> None:
    calls = [(name, node) for name, file in FILES.items() for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    errors = [
        each for each in calls if isinstance(each[1], ast.Call) and getattr(each[1].func, "id", "") == "UserError"
    ]
    assert len(errors) > 300
    assert [f"{name}:{call.lineno}" for name, call in errors if "hint" not in {key.arg for key in call.keywords}] == []


class Renamed(ast.NodeTransformer):
    """Variables by the order in which they come, without annotations."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.setdefault(node.id, str(len(self.names)))
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = self.names.setdefault(node.arg, str(len(self.names))), None
        return node


def written(function: ast.FunctionDef) -> str:
    """What a function does, whatever it and its variables are called."""
    said = 1 if ast.get_docstring(function) else 0
    return ast.dump(Renamed().visit(ast.Module([function.args, *function.body[said:]], [])))


def test_no_function_is_written_twice() -> None:
    found: dict[str, list[str]] = {}
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and len(ast.unparse(node.body).splitlines()) >= LINES:
                found.setdefault(written(node), []).append(f"{name}.{node.name}")
    assert len(found) > 1000
    assert [places for places in found.values() if len(places) > 1] == []


def test_experiments_can_be_imported_without_running() -> None:
    files = sorted((Path(__file__).parents[2] / "experiments").rglob("*.py"))
    bodies = {str(file): ast.parse(file.read_text(encoding="utf-8")).body for file in files}
    calls = {(name, ast.unparse(node)) for name, body in bodies.items() for node in body if isinstance(node, ast.Expr)}
    assert len(files) > 20
    assert not [call for call in calls if call[1].startswith("main(")]


def test_what_experiments_and_documents_import_is_there() -> None:
    root = Path(__file__).parents[2]
    sources = [file.read_text(encoding="utf-8") for file in root.glob("experiments/**/*.py")]
    for file in [root / "README.md", *root.glob("docs/**/*.md")]:
        sources += re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    wanted = {
        (node.module, alias.name)
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hdm_lightning")
        for alias in node.names
    }
    assert len(wanted) > 20
    assert not [place for place in wanted if not provided(*place)]


def provided(module: str, name: str) -> bool:
    """Whether a name can be imported from a module."""
    if f"{module}.{name}" in FILES:
        return True
    try:
        return hasattr(import_module(module), name)
    except ModuleNotFoundError:
        return False
