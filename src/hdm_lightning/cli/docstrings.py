"""Read parameter descriptions of classes and functions from their source, without importing it."""

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PLAIN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "Path": "a path",
    "None": "null",
    "dict": "a mapping",
    "Mapping": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
}
_BOUNDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "{} or less"}
_MEMBERS = {"Gt": "gt", "Ge": "ge", "Lt": "lt", "Le": "le"}
_SECTION = r"^{}:\n((?: .*\n?|\n)+)"


@dataclass(frozen=True)
class Definition:
    """A class, function or type alias and its file."""

    file: Path
    node: ast.AST


@dataclass(frozen=True)
class Parameter:
    """A parameter of a class or function.

    Attributes:
        meaning: its text in the docstring; empty if undocumented.
        default: its source text; empty if a value is required.
        annotation: type annotation, with the file that resolves its names; None if unannotated.
        file: file that defines it.
    """

    meaning: str
    default: str
    annotation: Definition | None
    file: Path

    def is_within(self, package: str) -> bool:
        """Return whether it is defined within a package."""
        return package in self.file.parts

    def kind(self) -> str:
        """Describe the accepted values: ``a whole number above 0``; empty if the annotation is not known."""
        return _kind(self.annotation.node, self.annotation.file) if self.annotation else ""

    def members(self) -> tuple[Definition | None, bool]:
        """Return the class whose fields are keys below this one, and whether user-chosen names come in between."""
        if self.annotation is None:
            return None, False
        named = re.match(r"(dict|Mapping)\[str, ", ast.unparse(self.annotation.node)) is not None
        for node in ast.walk(self.annotation.node):
            found = _named(node.id, self.annotation.file) if isinstance(node, ast.Name) else None
            if found and _is_dataclass(found.node):
                return found, named
        return None, False


def find(name: str) -> Definition | None:
    """Resolve a dotted name, following re-exports; None if its source is not available."""
    first, *rest = name.split(".")
    spec = importlib.util.find_spec(first)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(next(iter(spec.submodule_search_locations)))
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place /= rest.pop(0)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not rest or not file.is_file():
        return None
    found = _named(rest.pop(0), file)
    for part in rest:
        body = found.node.body if found and isinstance(found.node, ast.ClassDef) else ()
        inner = next((each for each in body if getattr(each, "name", None) == part), None)
        found = Definition(found.file, inner) if found and inner else None
    return found


def parameters(taker: Definition) -> dict[str, Parameter]:
    """Return the parameters of a function or constructor, or the fields of a dataclass, base classes first."""
    if not isinstance(taker.node, ast.ClassDef):
        return _signature(taker, _meanings(taker.node))
    found: dict[str, Parameter] = {}
    for base in taker.node.bases:
        inherited = _named(base.id, taker.file) if isinstance(base, ast.Name) else None
        found |= parameters(inherited) if inherited else {}
    texts = {name: each.meaning for name, each in found.items()} | _meanings(taker.node)
    own = [each for each in taker.node.body if getattr(each, "name", None) == "__init__"]
    if own:
        return _signature(Definition(taker.file, own[0]), texts | _meanings(own[0]))
    return found | _fields(taker, texts)


def summary(taker: Definition) -> str:
    """Return the first paragraph of a docstring."""
    return " ".join((_docstring(taker.node).split("\n\n")[0]).split())


@cache
def _module(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _named(name: str, file: Path) -> Definition | None:
    """Resolve a top-level name of a file."""
    for node in _module(file).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(file, node)
        if isinstance(node, ast.Assign) and [ast.unparse(each) for each in node.targets] == [name]:
            return Definition(file, node.value)
    for each in ast.walk(_module(file)):
        if isinstance(each, ast.ImportFrom) and each.module and not each.level:
            sources = {alias.asname or alias.name: alias.name for alias in each.names}
            if name in sources:
                return find(f"{each.module}.{sources[name]}")
    return None


def _docstring(node: ast.AST) -> str:
    documented = isinstance(node, ast.ClassDef | ast.FunctionDef)
    return inspect.cleandoc(ast.get_docstring(node) or "") if documented else ""  # type: ignore[arg-type]


def described(docstring: str, section: str) -> dict[str, str]:
    """Return name to description from the "Args" or "Attributes" of a cleaned docstring."""
    texts: dict[str, str] = {}
    found = re.search(_SECTION.format(section), docstring, re.MULTILINE)
    for entry in re.split(r"\n {4}(?! )", "\n" + found[1]) if found else ():
        names, _, text = entry.partition(":")
        texts |= dict.fromkeys(" ".join(names.split()).split(", "), " ".join(text.split()))
    return texts


def _meanings(node: ast.AST) -> dict[str, str]:
    texts = described(_docstring(node), "Args") | described(_docstring(node), "Attributes")
    return {name: text.replace("``", "`") for name, text in texts.items()}


def _signature(function: Definition, texts: dict[str, str]) -> dict[str, Parameter]:
    arguments = getattr(function.node, "args", None)
    if not isinstance(arguments, ast.arguments):
        return {}
    placed = [*arguments.posonlyargs, *arguments.args]
    without: list[ast.expr | None] = [None] * (len(placed) - len(arguments.defaults))
    defaults = [*without, *arguments.defaults, *arguments.kw_defaults]
    return {
        each.arg: _parameter(texts.get(each.arg, ""), each.annotation, default, function.file)
        for each, default in zip([*placed, *arguments.kwonlyargs], defaults, strict=True)
        if each.arg not in ("self", "cls")
    }


def _fields(kind: Definition, texts: dict[str, str]) -> dict[str, Parameter]:
    return {
        node.target.id: _parameter(texts.get(node.target.id, ""), node.annotation, node.value, kind.file)
        for node in getattr(kind.node, "body", ())
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _is_dataclass(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and bool(node.decorator_list)


def _parameter(meaning: str, annotation: ast.expr | None, default: ast.expr | None, file: Path) -> Parameter:
    shown = "" if default is None else ast.unparse(default)
    made = re.fullmatch(r"field\(default_factory=(list|dict|\w+)\)", shown)
    shown = {"list": "[]", "dict": "{}"}.get(made[1], "") if made else shown
    return Parameter(meaning, shown, Definition(file, annotation) if annotation else None, file)


def _kind(node: ast.AST, file: Path) -> str:
    if isinstance(node, ast.BinOp):
        return " or ".join(dict.fromkeys(each for each in (_kind(node.left, file), _kind(node.right, file)) if each))
    if isinstance(node, ast.Constant):
        return _PLAIN.get(str(node.value), "")
    if isinstance(node, ast.Name) and node.id not in _PLAIN:
        alias = _named(node.id, file)
        return _kind(alias.node, alias.file) if alias else ""
    if isinstance(node, ast.ClassDef):
        return _PLAIN["dict"] if _is_dataclass(node) else ""
    if isinstance(node, ast.Subscript):
        return _subscripted(node, file)
    return _PLAIN.get(ast.unparse(node), "")


def _subscripted(node: ast.Subscript, file: Path) -> str:
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    outer = ast.unparse(node.value)
    if outer == "Literal":
        choices = [
            "null" if each.value is None else str(each.value) for each in inner if isinstance(each, ast.Constant)
        ]
        return "one of " + ", ".join({"True": "true", "False": "false"}.get(each, each) for each in choices)
    if outer == "Annotated":
        return " ".join([_kind(inner[0], file), " and ".join(_bounds(inner[1:]))]).strip()
    plain = _PLAIN.get(outer, "")
    item = _kind(inner[0], file)
    if plain != _PLAIN["list"] or not item:
        return plain
    exact = outer == "tuple" and not (len(inner) > 1 and ast.unparse(inner[1]) == "...")
    return f"a list of {len(inner)}, each {item}" if exact else f"a list, each {item}"


def _bounds(marks: list[ast.expr]) -> Iterator[str]:
    """Describe the limits in `Field(gt=0)`, `Interval(ge=0, le=1)`, `Ge(0)` and the like."""
    for mark in marks:
        if not isinstance(mark, ast.Call):
            continue
        given = {each.arg: each.value for each in mark.keywords}
        if mark.args:
            given[_MEMBERS.get(ast.unparse(mark.func), "")] = mark.args[0]
        limits = {name: ast.unparse(value) for name, value in given.items() if name in _BOUNDS}
        if set(limits) == {"ge", "le"}:
            yield f"from {limits['ge']} to {limits['le']}"
        else:
            yield from (words.format(limits[name]) for name, words in _BOUNDS.items() if name in limits)
