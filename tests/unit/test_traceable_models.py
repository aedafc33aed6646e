"""Nothing in models/ that a compiler of any admitted torch cannot trace, by the source: only one torch runs the tests.

What Dynamo of torch 2.9 and 2.11 folds to a constant is read off `constant_fold_functions` in their
`torch/_dynamo/variables/torch.py`; any other function of torch that returns no tensor breaks a graph there
(`torch.amp.is_autocast_available` did on 2.11, while 2.13 traces it).
"""

import ast
import builtins
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hdm_lightning.models

FOLDER = Path(hdm_lightning.models.__file__).parent
TRACED = ("attention", "blocks", "conditioning", "inputs", "positions", "routing", "xut")
"""The files that a forward pass runs through."""
READS_VALUES = {"inputs.check_conditions", "inputs.check_context_lengths", "inputs.kept_indices"}
"""Functions that read tensors behind `_readable`, which is false while compiling."""
BOOLEAN_KEEP = {"inputs._indices_of_mask"}
"""Reads a mask's counts, as `XUT.forward` says of a boolean `keep`; trainings and drawing give indices."""

FOLDED = {
    torch.promote_types,
    torch.is_complex,
    torch.is_floating_point,
    torch.get_default_dtype,
    torch.is_autocast_enabled,
    torch.get_autocast_dtype,
    torch.compiler.is_compiling,
}
CONTEXTS = {torch.autocast, torch.no_grad}
FACTORIES = {torch.arange, torch.cat, torch.full, torch.linspace, torch.ones, torch.rand, torch.stack, torch.zeros}
IN_GRAPH = set(chain.from_iterable(torch.overrides.get_overridable_functions().values()))
WAITS = ("item", "tolist", "numpy", "data_ptr", "nonzero", "cpu", "untyped_storage")
CONVERSIONS = ("bool", "float", "int")
STATEMENTS = (ast.Try, ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await, ast.Import, ast.ImportFrom)
SIDE_EFFECTS = ("print", "open", "input", "eval", "exec", "setattr", "delattr", "globals", "locals", "super")
NAMES = {"torch": torch, "F": F, "nn": nn}


def resolved(node):
    """The object of torch that an expression such as `torch.nn.functional.pad` names, or None."""
    path = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    found = NAMES.get(node.id) if isinstance(node, ast.Name) else None
    for name in reversed(path):
        found = getattr(found, name, None)
    return found


def faults(function):
    """Why a compiler may not trace a function, by line."""
    for node in ast.walk(function):
        if isinstance(node, STATEMENTS):
            yield node.lineno, type(node).__name__
        elif isinstance(node, ast.With):
            for item in node.items:
                call = item.context_expr
                if not isinstance(call, ast.Call) or resolved(call.func) not in CONTEXTS:
                    yield node.lineno, f"with {ast.unparse(call)}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, why) for why in call_faults(node))


def call_faults(node):
    """What is wrong with a call."""
    target, text = resolved(node.func), ast.unparse(node.func)
    if target is not None:
        if isinstance(target, type) and issubclass(target, nn.Module):
            return
        if target not in FOLDED | CONTEXTS | FACTORIES | IN_GRAPH:
            yield f"{text}() returns no tensor, or is not known to"
    elif isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
        yield f".{node.func.attr}() reads values"
    elif isinstance(node.func, ast.Name) and node.func.id in (*CONVERSIONS, *SIDE_EFFECTS):
        assert hasattr(builtins, node.func.id)
        constant = all(isinstance(each, ast.Constant | ast.BinOp) for each in node.args)
        if node.func.id in SIDE_EFFECTS or not constant:
            yield f"{text}()"
    elif isinstance(node.func, ast.Name) and node.func.id == "isinstance" and "Tensor" in ast.unparse(node.args[1]):
        yield "isinstance of a tensor's class"


def traced_functions(name, source):
    """Functions and methods that run in a forward pass: all but constructors, class methods and hooks of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name not in ("__init__", "_apply", "reset_parameters"):
            decorators = [ast.unparse(each) for each in node.decorator_list]
            if "classmethod" not in decorators:
                yield f"{name}.{node.name}", node


@pytest.mark.parametrize("name", TRACED)
def test_a_forward_pass_has_nothing_that_breaks_a_graph(name):
    found = {
        (where, fault)
        for where, function in traced_functions(name, (FOLDER / f"{name}.py").read_text())
        for fault in faults(function)
        if where not in READS_VALUES | BOOLEAN_KEEP
    }
    assert not found


def test_values_are_read_behind_the_question_whether_a_compiler_looks():
    source = dict(traced_functions("inputs", (FOLDER / "inputs.py").read_text()))
    for where in READS_VALUES:
        function = source[where]
        guarded = [
            node for node in ast.walk(function) if isinstance(node, ast.If) and "_readable(" in ast.unparse(node)
        ]
        inside = {id(part) for node in guarded for part in ast.walk(node)}
        outside = ast.Module([], [])
        outside.body = [node for node in ast.walk(function) if isinstance(node, ast.Call) and id(node) not in inside]
        assert guarded and not [why for node in outside.body for why in call_faults(node)]


@pytest.mark.parametrize(
    "line",
    [
        "if torch.amp.is_autocast_available(x.device.type): pass",
        "x.item()",
        "y = x.nonzero()",
        "bool(x.any())",
        "n = int(x.max())",
        "with contextlib.suppress(ValueError): pass",
        "with torch.profiler.record_function('attention'): pass",
        "try: pass\n    except ValueError: pass",
        "isinstance(x, torch.Tensor)",
        "torch.cuda.synchronize()",
        "torch.backends.cuda.flash_sdp_enabled()",
        "print(x.shape)",
        "import math",
    ],
)
def test_what_breaks_a_graph_is_seen(line):
    function = ast.parse(f"def forward(self, x):\n    {line}").body[0]
    assert list(faults(function))


@pytest.mark.parametrize(
    "line",
    [
        "with torch.autocast('cpu', enabled=False): y = F.rms_norm(x, (3,), eps=1e-6)",
        "kind = torch.promote_types(x.dtype, torch.float32)",
        "y = torch.addcmul(x, x, x).to(x.dtype)",
        "if torch.compiler.is_compiling(): pass",
    ],
)
def test_what_is_traced_everywhere_is_let_through(line):
    assert not list(faults(ast.parse(f"def forward(self, x):\n    {line}").body[0]))
