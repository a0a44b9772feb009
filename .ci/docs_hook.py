"""MkDocs hook: puts the files outside docs/ that its pages link to on the site as well.

In the repository such links lead to the files themselves, so the pages read well there too. On the
site a Markdown file becomes a page, any other file a page with its text, and a folder a list.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(```+).*?^\1$", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".toml": "toml"}


def linked(page: Path, target: str) -> Path | None:
    """Returns the file or folder outside docs/ that a link of `page` leads to, if it does."""
    if ":" in target:
        return None
    path = Path(os.path.normpath(page.parent / target))
    return None if path.is_relative_to(ROOT / "docs") or not path.exists() else path


def address(path: Path) -> str:
    """Returns where on the site the page of a file or folder outside docs/ is."""
    name = path.relative_to(ROOT).as_posix()
    return f"files/{name}" if path.suffix == ".md" else f"files/{name}.md"


def source_of(file: File) -> Path:
    """Returns the file in the repository that a page of the site shows."""
    if not file.src_uri.startswith("files/"):
        return ROOT / "docs" / file.src_uri
    name = file.src_uri.removeprefix("files/")
    return ROOT / name if (ROOT / name).exists() else ROOT / name.removesuffix(".md")


def contents(path: Path) -> str:
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        entries = [entry.name for entry in sorted(path.iterdir()) if entry.name[0] not in "._"]
        return f"{hidden}# {name}\n\n" + "".join(f"- `{entry}`\n" for entry in entries)
    text = path.read_text()
    if path.suffix == ".md":
        return text
    return f"{hidden}# {name}\n\n``````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n``````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages()]
    known = set()
    while waiting:
        page = waiting.pop()
        for _, target, _ in LINK.findall(FENCE.sub("", page.read_text())):
            path = linked(page, target)
            if path is None or path in known:
                continue
            known.add(path)
            files.append(
                File.generated(
                    config,
                    address(path),
                    content=contents(path),
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = source_of(page.file)
    if source.suffix != ".md":
        return markdown
    here = os.path.dirname(page.file.src_uri)

    def rewritten(link: re.Match) -> str:
        before, target, after = link.groups()
        path = linked(source, target)
        if path is not None:
            to = address(path)
        elif ":" not in target and here.startswith("files"):  # from outside docs/ into it
            inside = os.path.normpath(source.parent / target)
            to = os.path.relpath(inside, ROOT / "docs")
        else:
            return link[0]
        return f"{before}{os.path.relpath(to, here)}{after}"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join(parts) + LINK.sub(rewritten, markdown[end:])
