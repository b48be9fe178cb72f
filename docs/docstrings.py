"""What this project's docstrings leave to the reader, said the way griffe's parser of docstrings wants it.

- One item may name several things: `rtol, atol: as in solve`, `steps: K of each. seed: of all draws`. Each gets its own.
- Examples stand without a heading. They get one.
- Public names in backticks become links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Raises):\n((?:    .*\n?|\n(?=    ))+)", re.MULTILINE)
_NAMES = re.compile(r"(?:^|(?<=\. )|(?<=\.\n    ))(\w+(?:, \w+)*): ", re.MULTILINE)
_EXAMPLE = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)
_QUOTED = re.compile(r"(?<![`\[])`(\w+)`(?!`)")


class HouseStyle(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded, before they are parsed."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """All of its modules, classes, functions and attributes."""
        public = {name: pkg.members[name] for name in pkg.exports or ()}
        public |= {
            name: thing.members[name] for name, thing in public.items() if thing.is_module and name in thing.members
        }
        links = {name: thing.canonical_path for name, thing in public.items() if not thing.is_module}
        for thing in _everything(pkg):
            if thing.docstring is not None:
                thing.docstring.value = _rewritten(thing.docstring.value, thing, links)


def _everything(thing: Any) -> Iterator[Any]:
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from _everything(member)


def _rewritten(text: str, thing: Any, links: dict[str, str]) -> str:
    known = {*thing.members, *(parameter.name for parameter in getattr(thing, "parameters", ()))}
    text = _SECTION.sub(lambda found: f"{found[1]}:\n{_items(found[2], known, found[1] == 'Raises')}", text)
    places = {name: path for name, path in links.items() if path != thing.path}
    pieces, at = [], 0
    for example in _EXAMPLE.finditer(text):
        code = example[0].rstrip("\n").replace("\n", "\n    ")
        pieces += [_linked(text[at : example.start()], places), f"Examples:\n    {code}\n"]
        at = example.end()
    return "".join([*pieces, _linked(text[at:], places)])


def _linked(text: str, places: dict[str, str]) -> str:
    return _QUOTED.sub(lambda found: f"[{found[0]}][{places[found[1]]}]" if found[1] in places else found[0], text)


def _items(text: str, known: set[str], errors: bool) -> str:
    """The items of a section, one a name; a name counts where the code has it (or is an error's), else it is a word."""
    body = re.sub(r"^    ", "", text, flags=re.MULTILINE).rstrip("\n")
    names = {word for word in re.findall(r"\w+", body) if word.endswith("Error")} if errors else known
    found = [match for match in _NAMES.finditer(body) if set(match[1].split(", ")) <= names]
    if not found or found[0].start():
        return text
    ends = [match.start() for match in found[1:]] + [len(body)]
    items = []
    for match, end in zip(found, ends, strict=True):
        said = body[match.end() : end].rstrip().replace("\n", "\n    ")
        items += [f"    {name}: {said}\n" for name in match[1].split(", ")]
    return "".join(items) + "\n"
