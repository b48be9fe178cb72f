"""The Python of README and of docs/ runs as it stands, and what they point to is there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest

import metabroyden as mb
from metabroyden.foreign import load

load("torchvision")  # Lightning, which a page of the reference needs, imports it

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE_BY_RUNS = {"results/models/dense-stripes", "results/gpu/race"}
PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def programs() -> dict[str, dict[str, str]]:
    """Names and texts of the files that one process runs: each block of README, and together each page of docs/, whole."""
    readme = {f"README {number}": {"README": code} for number, code in enumerate(blocks_of("README.md"))}
    return readme | {"docs": {page.replace("/", "."): "\n".join(blocks_of(page)) for page in PAGES}}


@pytest.mark.parametrize("name", programs())
def test_the_python_of_readme_and_docs_runs(name, tmp_path):
    files = {tmp_path / f"{page}.py": code for page, code in programs()[name].items()}
    for path, code in files.items():
        path.write_text(
            code.replace("/tmp/", f"{tmp_path}/").replace("seconds=60", "seconds=3").replace("randn(600", "randn(100")
        )
    ours = rf"{re.escape(str(tmp_path))}|__main__|(metabroyden|experiments)(\.|$)|torch\.(nn|autograd)\."
    run = (
        "import runpy, sys, warnings; warnings.filterwarnings('error', module=sys.argv[1]); "
        "[runpy.run_path(path, run_name='__main__') for path in sys.argv[2:]]"
    )
    subprocess.run([sys.executable, "-c", run, ours, *files], check=True, cwd=ROOT, timeout=200)


def test_readme_is_short_and_the_guides_have_their_examples():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    assert len(text.encode()) <= 14_000
    assert len(blocks_of("README.md")) == 5
    guides = [page for page in PAGES if not page.startswith(("docs/api/", "docs/results/"))]
    without = {page for page in guides if not blocks_of(page)}
    prose = "architecture faq how-it-works limitations protocol tutorials"
    assert without == {f"docs/{page}.md" for page in prose.split()}


def tables_of(path: Path) -> dict[str, dict[str, list[str]]]:
    """By heading, the rows of a report's tables by their first cell."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in path.read_text().split("\n## "):
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        found[part.splitlines()[0]] = {line[0].strip("*"): line for line in lines}
    return found


def test_the_numbers_of_readme_are_those_of_the_race():
    text, tables = (ROOT / "README.md").read_text(), tables_of(ROOT / "results/race/report.md")
    loose, tight = (
        next(rows for name, rows in tables.items() if name.startswith(f"To {at}, by")) for at in (0.01, 0.001)
    )
    rows = [
        line.strip("| ").split(" | ") for line in text.split("## Results")[1].splitlines() if line.count(" | ") == 4
    ]
    assert len(rows) == len(loose), "a line a family, and the heading's two"
    for family, ours, best, evaluations, time in rows[2:]:
        for at, line in enumerate((loose[family], tight[family])):
            for cell, column in ((ours, 1), (best, 2)):
                assert cell.split(" / ")[at].split(" ")[0] == line[column].split(" ")[0], (family, cell, line)
            for cell, column in ((evaluations, 3), (time, 5)):
                assert cell.split(" / ")[at] == line[column].split(" ")[0], (family, cell, line)
    every = tables["Geometric means over families"]
    means, kept = (every[f"the best, the fastest classical{more}"] for more in ("", ": what calls returned"))
    assert means[1] == "0.001", "the later of two lines"
    assert f"and {means[6].split(' ')[0]} times to 1e-3" in text.replace("\n", " ")
    assert f"and {means[7].split(' ')[0]} times the fastest" in text.replace("\n", " ")
    assert f"and {kept[7]} times the time" in text.replace("\n", " ")


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_file_that_a_page_points_to_or_names_exists(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#:]+)", text) if link]
    assert links or page != "README.md"
    for link in links:
        assert (folder / link).exists(), link
    named = set(re.findall(r"`((?:results|metabroyden|experiments|tests)/[\w./-]+?)/?`", text))
    for path in named - MADE_BY_RUNS if page in PAGES else ():
        assert (ROOT / path).exists(), path


def test_links_to_files_that_are_no_pages_become_paths_in_the_site():
    hook = runpy.run_path(str(DOCS / "site_links.py"))["on_page_markdown"]
    given = "[its report](../../results/lost/report.md), [a page](../faq.md)"
    assert hook(given, page=None, config=None, files=None) == "`results/lost/report.md`, [a page](../faq.md)"


def test_every_page_is_in_the_navigation():
    found = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(f"docs/{page}" for page in found) == PAGES


def test_the_reference_has_every_public_name():
    named = [name for page in PAGES for name in re.findall(r"^::: (\S+)", (ROOT / page).read_text(), re.M)]
    assert len(named) == len(set(named))
    shown = [resolve_name(name) for name in named]
    missing = {name for name in mb.__all__ if not any(getattr(mb, name) is thing for thing in shown)}
    assert missing == {"integrations"}  # whose members are shown
