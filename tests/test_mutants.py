"""`make mutants` puts in the faults that it says it puts in, and knows what they are."""

from __future__ import annotations

import ast

from tests.mutants import changes

SOURCE = '''
"""A module."""
def pick(a: "x < y", *, copied=True):
    """Pick; 1 < 2."""
    assert a < 3
    if a.ready(key=1) and not a.done:
        raise ValueError(f"{a + 1}")
    a.size += 1
    return a.clone()
'''


def test_every_kind_of_fault_is_made_once_and_words_are_left_alone():
    tree, made = ast.parse(SOURCE), []
    for edit in changes.edits(tree):
        back = edit.exchange()
        made.append(ast.unparse(tree).splitlines())
        back.exchange()
    plain = ast.unparse(tree).splitlines()
    assert sorted(changes.worded(plain, lines) for lines in made) == sorted(
        [
            "def pick(a: 'x < y', *, copied=True): → def pick(a: 'x < y', *, copied=False):",
            "if a.ready(key=1) and (not a.done): → if a.ready(key=1) or not a.done:",
            "if a.ready(key=1) and (not a.done): → if not (a.ready(key=1) and (not a.done)):",
            "if a.ready(key=1) and (not a.done): → if a.ready(key=2) and (not a.done):",
            "if a.ready(key=1) and (not a.done): → if a.ready() and (not a.done):",
            "if a.ready(key=1) and (not a.done): → if a.ready(key=1) and a.done:",
            "raise ValueError(f'{a + 1}') → pass",
            "a.size += 1 → a.size -= 1",
            "a.size += 1 → a.size += 2",
            "a.size += 1 → pass",
            "return a.clone() → return None",
            "return a.clone() → return a",
        ]
    )
    assert changes.functions(tree) == [("pick", 3, 4, 9)]
