"""Analyzes the source of a forward for facts that are not in a trace.

Code without a source, such as code typed at Python's prompt, counts as unknown.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType

from torch import nn

_ASKS_FOR_TYPES = {"isinstance", "issubclass", "type"}
_TAKE_WHOLE = {"checkpoint", "data_parallel"}
_TAKE_NOTHING = {"buffers", "named_buffers", "named_parameters", "parameters", "state_dict"}
_TAKE_ANY = {"_modules", "children", "get_submodule", "getattr", "named_children"}


class UnreadableError(Exception):
    """A forward without a source."""


class Source:
    """``forward`` and the methods of its class that it may call, by their names, parsed.

    Raises:
        UnreadableError: if one of them has no source.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        self.trees: list[ast.AST] = []
        self.names: set[str] = set()
        found, pending = set(), ["forward"]
        while pending:
            for method in _versions(cls, pending.pop()):
                if method in found:
                    break
                found.add(method)
                tree = _parsed(method)
                names = set(_names(tree))
                self.trees.append(tree)
                self.names |= names
                pending += names
                if "super" not in names:
                    break

    @property
    def asks_for_types(self) -> bool:
        """Whether it checks types. It sees proxies in a trace, and other classes once fused."""
        return bool(_ASKS_FOR_TYPES & self.names)

    @property
    def catches_errors(self) -> bool:
        """Whether it catches exceptions. An error in a trace may not occur with tensors."""
        nodes = (node for tree in self.trees for node in ast.walk(tree))
        return "suppress" in self.names or any(isinstance(n, ast.ExceptHandler) for n in nodes)

    def calls_whole(self, child: str) -> bool:
        """Whether the code calls a child of the module, and does nothing else with it."""
        if _TAKE_ANY & self.names:
            return False
        called = False
        for tree in self.trees:
            fine: set[ast.AST] = set()
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    fine.add(node.func)
                    name = getattr(node.func, "attr", getattr(node.func, "id", None))
                    fine.update(node.args if name in _TAKE_WHOLE else ())
                elif isinstance(node, ast.Attribute) and node.attr in _TAKE_NOTHING:
                    fine.add(node.value)
            uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == child]
            if not fine.issuperset(uses):
                return False
            called = called or bool(uses)
        return called


def is_called_whole(owner: nn.Module, child: str) -> bool:
    """Whether a module calls this child as a whole and does nothing else with it."""
    try:
        return Source(type(owner)).calls_whole(child)
    except UnreadableError:
        return False


def refuses(error: Exception) -> bool:
    """Whether an error comes from a ``raise`` or ``assert`` statement outside of PyTorch."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        return False
    code, line = trace.tb_frame.f_code, trace.tb_lineno
    try:
        tree = _parsed(code)
    except UnreadableError:
        return False
    at = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and _covers(n, line)]
    statement = max(at, key=lambda n: n.lineno)
    if any(n is not statement and n.lineno == statement.lineno for n in at):
        return False  # the condition of a one-line `if` may have failed instead
    if isinstance(statement, ast.Assert):
        return isinstance(error, AssertionError)
    if not isinstance(statement, ast.Raise):
        return False
    raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
    # An error of another class was raised while the message was computed.
    return getattr(raised, "attr", getattr(raised, "id", None)) == type(error).__name__


def _versions(cls: type, name: str) -> Iterator[Callable[..., object]]:
    """The methods of this name in a class and its bases, up to nn.Module's."""
    for c in cls.__mro__:
        if c is nn.Module or name not in vars(c):
            continue
        version = vars(c)[name]
        method = inspect.unwrap(getattr(version, "fget", version))
        if not inspect.isfunction(method):
            return
        yield method


def _parsed(code: Callable[..., object] | CodeType) -> ast.AST:
    """The parsed source, with the numbers of its lines in the file."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError) as error:
        name = code.co_name if isinstance(code, CodeType) else code.__name__
        raise UnreadableError(f"there is no source of {name}") from error
    return ast.increment_lineno(tree, max(first, 1) - 1)


def _covers(statement: ast.stmt, line: int) -> bool:
    return statement.lineno <= line <= (statement.end_lineno or statement.lineno)


def _names(tree: ast.AST) -> Iterator[str]:
    """All names and attributes, among them those of inner functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
