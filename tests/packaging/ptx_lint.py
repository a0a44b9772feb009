"""Checks the kernels' PTX and machine code for mistakes that only a GPU would notice.

    make ptx-lint
    python tests/packaging/ptx_lint.py FOLDER    checks the *.ptx and *.cubin of a build

The PTX of a kernel must not access global memory by an address in shared memory; must have no
generic access, since the kernels know the memory that they address; must not make an address of
shared or local memory generic, since that leads to such accesses; must not use local memory; and
must not call a function. Its machine code must have no stack, since registers are spilled there.
Exits with 1 and prints one line per finding.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);")
REGISTER = re.compile(r"%\w+")
ACCESSES = ("ld", "ldu", "st", "atom", "red", "prefetch", "cp")
SPACES = {"global", "shared", "local", "param", "const"}


class Finding(NamedTuple):
    file: str
    kernel: str
    what: str


def lint_ptx(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Returns the kernels, and (kernel, what) of every finding."""
    functions = re.split(
        r"^(?=(?:\.visible |\.weak )?\.(?:entry|func)\b)", text, flags=re.MULTILINE
    )
    shared = set(re.findall(r"\.shared\s[^;]*?([\w$]+)(?:\[[^\]]*\])*\s*;", text))
    kernels, findings = set(), []
    for function in functions[1:]:
        name = re.search(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)", function)[1]
        kernels.add(name)
        found = dict.fromkeys(_findings(function, shared))
        findings += [(name, what) for what in found]
    return kernels, findings


def _findings(function: str, shared: set[str]) -> Iterator[str]:
    body = [(m[1].split("."), m[2]) for m in map(INSTRUCTION.match, function.splitlines()) if m]
    tainted = _from_shared(body, shared)
    for (name, *modifiers), operands in body:
        instruction = ".".join([name, *modifiers])
        if name == "cvta" and modifiers[0] in ("shared", "local"):
            yield f"{instruction}: an address of {modifiers[0]} memory made generic"
        if name == "call":
            yield f"call of {operands}"
        if name not in ACCESSES:
            continue
        spaces = {modifier.split("::")[0] for modifier in modifiers} & SPACES
        addresses = set(REGISTER.findall(" ".join(re.findall(r"\[[^\]]*\]", operands))))
        if not spaces:
            yield f"{instruction}: a generic access"
        if "local" in spaces:
            yield f"{instruction}: local memory"
        if spaces == {"global"} and addresses & tainted:
            yield f"{instruction} of an address in shared memory"


def _from_shared(body: list[tuple[list[str], str]], shared: set[str]) -> set[str]:
    """Returns the registers with generic addresses of shared memory, or results of these."""
    tainted: set[str] = set()
    while True:
        before = len(tainted)
        for (name, *modifiers), operands in body:
            # Loaded or compared values are no addresses, and cvta.to makes one of one space again.
            if name in (*ACCESSES, "setp", "bra") or not operands.startswith(("%", "{")):
                continue
            into, *rest = operands.split(",", 1)
            sources = set(re.findall(r"[%\w$]+", rest[0] if rest else ""))
            generic = name == "cvta" and modifiers[0] == "shared"
            named = name == "mov" and modifiers[-1] == "u64" and sources & shared
            if generic or named or (sources & tainted and modifiers[:1] != ["to"]):
                tainted |= set(REGISTER.findall(into))
        if len(tainted) == before:
            return tainted


# ---- machine code --------------------------------------------------------------------------------

# Of .nv.info: the format of an attribute with a size, and the attributes of a symbol's stack.
SIZED, FRAME_SIZE, MIN_STACK_SIZE = 0x04, 0x11, 0x12


def lint_cubin(data: bytes) -> tuple[set[str], list[tuple[str, str]]]:
    """Returns the kernels, and (kernel, what) of each that has a stack."""
    sections = _sections(data)
    (symbols,) = (s for s in sections if s.name == ".symtab")
    names = next(s for s in sections if s.name == ".strtab").content
    kernels = {s.name.removeprefix(".text.") for s in sections if s.name.startswith(".text.")}
    info = next(s for s in sections if s.name == ".nv.info").content
    findings, at = [], 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind != SIZED:
            continue  # the size is the value
        if attribute in (FRAME_SIZE, MIN_STACK_SIZE):
            symbol, bytes_ = struct.unpack_from("<II", info, at)
            (name,) = struct.unpack_from("<I", symbols.content, 24 * symbol)
            kernel = _string(names, name)
            if attribute == FRAME_SIZE and bytes_ and kernel in kernels:
                findings.append((kernel, f"a stack of {bytes_} bytes: registers are spilled"))
        at += size
    return kernels, findings


class _Section(NamedTuple):
    name: str
    content: bytes


def _sections(data: bytes) -> list[_Section]:
    """Returns the sections of a 64-bit ELF file."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("data must be a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    contents = [data[h[4] : h[4] + h[5]] if h[1] != 8 else b"" for h in headers]
    return [
        _Section(_string(contents[names], h[0]), content)
        for h, content in zip(headers, contents, strict=True)
    ]


def _string(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


# ---- a folder ------------------------------------------------------------------------------------


def lint(folder: Path) -> tuple[dict[str, int], list[Finding]]:
    """Returns the number of kernels by file, and the findings."""
    counts, findings = {}, []
    for path in sorted([*folder.rglob("*.ptx"), *folder.rglob("*.cubin")]):
        if path.suffix == ".ptx":
            text = path.read_text()
            kernels, found = lint_ptx(text)
            target = re.search(r"^\.target (\w+)", text, re.MULTILINE)[1]
        else:
            data = path.read_bytes()
            kernels, found = lint_cubin(data)
            target = f"sm_{data[0x31]}"  # of the ELF header's flags
        kind = "PTX" if path.suffix == ".ptx" else "code"
        name = f"{path.name.split('.')[0]}, {kind} of {target}"
        counts[name] = len(kernels)
        findings += [Finding(name, kernel, what) for kernel, what in found]
    return counts, findings


def readable(findings: list[Finding]) -> list[str]:
    names = [f.kernel for f in findings]
    if findings and shutil.which("c++filt"):
        command = ["c++filt", "--no-params", *names]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        names = [name.replace("gankernels::cuda::", "") for name in result.stdout.splitlines()]
        names = [name.removeprefix("void ") for name in names]
    return [f"{f.file}: {name}: {f.what}" for f, name in zip(findings, names, strict=True)]


def main() -> int:
    counts, findings = lint(Path(sys.argv[1]))
    for name, count in counts.items():
        print(f"{name}: {count} kernels, {sum(f.file == name for f in findings)} findings")
    print(*readable(findings), sep="\n", end="\n" if findings else "")
    return int(bool(findings) or not counts)


if __name__ == "__main__":
    sys.exit(main())
