"""What a reader of tests would have to look for: mistakes that only another machine shows."""

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
