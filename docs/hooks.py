# SPDX-License-Identifier: Apache-2.0
"""What the site has beside docs/: the changelog and the examples, and links to them that work here as in the tree."""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Files of the tree that are pages of the site, with the page of each.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</\1>', re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def example_pages() -> dict[str, Path]:
    """Page of the site -> example."""
    return {f"examples/{path.stem}.md": path for path in sorted((ROOT / "examples").glob("*.py"))}


def example_page(path: Path) -> str:
    """An example as a page: what it says of itself, then its code."""
    source = path.read_text("utf-8")
    title, _, rest = (ast.get_docstring(ast.parse(source)) or path.stem).partition("\n")
    return f'# {path.stem}\n\n{title}\n{rest}\n\n```python title="examples/{path.name}"\n{source}```\n'


def resolve(page: str, target: str) -> str:
    """Where a link of a page in docs/ leads on the site.

    Args:
        page: path of the page below docs/.
        target: of the link, relative to the page, as it is in the tree.

    Raises:
        ValueError: it leads out of docs/ to a file that is no page of the site.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    if path.startswith("docs/"):
        return target
    found = PAGES.get(path) or next((name for name, source in example_pages().items() if source == ROOT / path), None)
    if found is None:
        raise ValueError(f"docs/{page}: {target} is neither below docs/ nor a page of the site")
    return posixpath.relpath(found, posixpath.dirname(page) or ".")


def rewrite(page: str, markdown: str) -> str:
    """A page with its links as they are on the site."""
    return LINK.sub(lambda match: resolve(page, match["path"]) + (match["anchor"] or ""), markdown)


def on_config(config: Any) -> Any:
    """Fill the list of examples."""
    for entry in config.nav:
        if "Examples" in entry:
            entry["Examples"] = [{PurePosixPath(page).stem: page} for page in example_pages()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that come from elsewhere."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text("utf-8")))
    for page, path in example_pages().items():
        files.append(File.generated(config, page, content=example_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links of the tree lead to pages of the site."""
    return rewrite(page.file.src_uri, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def converted(match: re.Match[str]) -> str:
        return convert(html.unescape(match["tex"]), display="block" if match[1] == "div" else "inline")

    return MATHS.sub(converted, content)
