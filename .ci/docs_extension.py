"""Griffe extension: turns the docstrings' reStructuredText into the Markdown of the site.

The docstrings are written like PyTorch's own: roles, formulas and simple tables. Formulas become
MathML, which browsers show without a script.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(\w+):`~?([^`]+)`")
FORMULA = re.compile(r"^( *)\.\. math:: *(.+)$", re.MULTILINE)
RULE = r"=+(?: +=+)+"
TABLE = re.compile(rf"^( *)({RULE})\n((?:.+\n)+?) *{RULE}$(?=\n\s*\n|\s*\Z)", re.MULTILINE)


def formula(latex: str, display: str = "inline") -> str:
    return convert(latex, display=display).replace("|", "&#x7C;")


def role(match: re.Match) -> str:
    kind, text = match.groups()
    if kind == "math":
        return formula(text)
    return f"[`{text}`][{text}]" if text.startswith("gankernels.") else f"`{text}`"


def table(match: re.Match) -> str:
    indent, rule, body = match.groups()
    columns = [(part.start(), part.end()) for part in re.finditer("=+", rule)]
    rows, head = [], None
    for line in body.rstrip("\n").split("\n"):
        line = line[len(indent) :]
        if set(line.strip()) <= {"=", " "}:  # what stood above it is the head
            head = rows.pop()
            continue
        cells = [line[start:end] for start, end in columns[:-1]] + [line[columns[-1][0] :]]
        rows.append([cell.strip() for cell in cells])
    head = head or [""] * len(columns)
    lines = [head, ["---"] * len(columns), *rows]
    return "\n".join(f"{indent}| {' | '.join(cells)} |" for cells in lines)


def markdown(text: str) -> str:
    text = FORMULA.sub(lambda m: m[1] + formula(m[2], "block"), text)
    return ROLE.sub(role, TABLE.sub(table, text))


class Docstrings(griffe.Extension):
    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Adds the layers that a function makes, which cannot be read off the source."""
        if not mod.path.startswith("gankernels.nn"):
            return
        for name, member in list(mod.members.items()):
            value = member.value if isinstance(member, griffe.Attribute) else None
            if not isinstance(value, griffe.ExprCall) or not name[0].isupper():
                continue
            made = getattr(importlib.import_module(mod.path), name)
            docstring = griffe.Docstring(inspect.getdoc(made))
            layer = griffe.Class(name, docstring=docstring, bases=[made.__base__.__name__])
            docstring.parent = layer
            mod.set_member(name, layer)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
