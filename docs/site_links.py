"""A hook of MkDocs. Pages link files of the repository that are no pages, which works where the repository is browsed; this
makes it work in the site: figures are copied into it, and any other link becomes the path of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(
    r"(!?)\[([^\]]*)\]\((?:\.\./)+((?:results|examples|metabroyden|experiments|tests)/[^)]+|[A-Z]+\.md)\)"
)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page's Markdown for the site; `files` gains the figures that it shows."""

    def in_site(link: re.Match[str]) -> str:
        is_figure, text, path = link.groups()
        if not is_figure:
            return f"`{path}`"
        from mkdocs.structure.files import File

        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
        return f"![{text}]({'../' * page.file.src_uri.count('/')}{path})"

    return LINK.sub(in_site, markdown)
