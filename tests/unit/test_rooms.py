"""The files of the package: no cycle among them, and each name once."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import hdm_lightning

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
