"""The names of lensjax that the benchmarks use are there. No benchmark is run: some need torch or other peers."""

import ast
import importlib
import types
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = sorted(BENCHMARKS.rglob("*.py"))


def find_name(module: str, name: str | None = None) -> object:
    """Return a module, or an attribute or submodule of it; None if there is no such thing."""
    try:
        found = importlib.import_module(module)
        if name is None or hasattr(found, name):
            return found if name is None else getattr(found, name)
        return importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"lensjax", "lensjax_kernels"}:
            raise  # lensjax is not at fault: a dependency is not installed
        return None


def missing_names(source: str) -> list[str]:
    """Return the imports from lensjax, and the attributes of its modules, that a script asks for in vain."""
    nodes = list(ast.walk(ast.parse(source)))
    missing: list[str] = []
    modules: dict[str, types.ModuleType] = {}  # by the name that the script gives them
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            asked = [(node.module, alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            asked = [(alias.name, None, alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for module, name, known_as in asked:
            if module.split(".")[0] not in {"lensjax", "lensjax_kernels"}:
                continue
            found = find_name(module, name)
            if found is None:
                missing.append(f"line {node.lineno}: {module}{'.' + name if name else ''}")
            elif isinstance(found, types.ModuleType):
                modules[known_as] = found
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in assigned:
            module = modules.get(node.value.id)
            if module is not None and find_name(module.__name__, node.attr) is None:
                missing.append(f"line {node.lineno}: {module.__name__}.{node.attr}")
    return missing


@pytest.mark.parametrize("file", FILES, ids=[file.relative_to(BENCHMARKS).as_posix() for file in FILES])
def test_benchmark_uses_names_that_exist(file):
    assert missing_names(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("from lensjax.metrics import rel_acc, no_such_name", "line 1: lensjax.metrics.no_such_name"),
        ("def main():\n    from lensjax import no_such_module", "line 2: lensjax.no_such_module"),
        ("from lensjax.no_such_module import rel_acc", "line 1: lensjax.no_such_module.rel_acc"),
        ("import lensjax.no_such_module", "line 1: lensjax.no_such_module"),
        ("from lensjax_kernels import no_such_name", "line 1: lensjax_kernels.no_such_name"),
        ("from lensjax import metrics\nmetrics.no_such_name()", "line 2: lensjax.metrics.no_such_name"),
        ("import lensjax as lj\nlj.fit\nlj.no_such_name", "line 3: lensjax.no_such_name"),
    ],
)
def test_a_name_that_does_not_exist_is_found(source, missing):
    assert missing_names(source) == [missing]


def test_names_of_others_and_submodules_are_accepted():
    assert missing_names("import no_such_peer\nfrom lensjax.tangents import program\nfrom lensjax import data") == []
