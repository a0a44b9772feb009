"""Conventions of tests and of the package that no tool checks."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Files with tests that run with CUDA as the default device too, and what those import.
ON_EVERY_DEVICE = sorted(
    {p for p in TESTS.rglob("test_*.py") if "mark.every_device" in p.read_text()}
    | {TESTS / "ops" / "oracle.py", TESTS / "property_based.py"}
)


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_there_are_such_files():
    assert len(ON_EVERY_DEVICE) > 8


@pytest.mark.parametrize("path", ON_EVERY_DEVICE, ids=lambda path: path.name)
def test_generators_are_of_the_default_device(path):
    """torch.Generator() is the CPU's whatever the default device, which then refuses to draw."""
    wrong = [
        node.lineno
        for node, name in calls(path)
        if name == "torch.Generator" and not (node.args or node.keywords)
    ]
    assert wrong == [], "use seeded() of tests/ops/oracle.py"


@pytest.mark.parametrize("path", ON_EVERY_DEVICE, ids=lambda path: path.name)
def test_arrays_are_made_of_what_is_on_the_cpu(path):
    """Tensor.numpy() raises on CUDA, and numpy's functions do where they are given such tensors."""
    wrong = [
        node.lineno
        for node, name in calls(path)
        if name.endswith(".numpy") and ".cpu()" not in name and ".to('cpu'" not in name
    ]
    assert wrong == []


#: Packages by floor: one imports from those before it only.
FLOORS = ("data", "games", "metrics", "train", "bench", "cli")
PACKAGE = TESTS.parent / "gankernels"


def imports():
    """(module, imported module), also where it is imported inside a function."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                members = (f"{node.module}.{alias.name}" for alias in node.names)
                found = [member if member in modules else node.module for member in members]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                continue
            yield from ((name, other) for other in found if other in modules and other != name)


def test_no_package_imports_from_a_floor_above():
    floor = {f"gankernels.{name}": i for i, name in enumerate(FLOORS)}

    def floor_of(module):
        return floor.get(".".join(module.split(".")[:2]), -1)

    found = list(imports())
    assert len(found) > 300
    assert [(a, b) for a, b in found if floor_of(b) > floor_of(a) >= 0] == []
    ground = [
        pair for pair in found if pair[0].startswith("gankernels._") and floor_of(pair[1]) >= 0
    ]
    assert ground == [("gankernels.__main__", "gankernels.cli")]


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_circles(package):
    above = {}
    for name, other in imports():
        if all(module.startswith(f"gankernels.{package}.") for module in (name, other)):
            above.setdefault(name, set()).add(other)
            above.setdefault(other, set())
    while free := [name for name, others in above.items() if not others]:
        for name in free:
            del above[name]
        for others in above.values():
            others.difference_update(free)
    assert above == {}, "circles, or above one"
