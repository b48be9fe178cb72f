"""`make mutants` counts only changes that mean something, and runs the tests that can tell."""

from __future__ import annotations

import pytest

from tests import mutants

SOURCE = "def pick(a: int | None, *, size: float = 2.0) -> int:\n    return dict(zip(a, a, strict=True))\n"


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ("int | None", "int + None", True),
        ("-> int", "-> float", True),
        ("strict=True", "strict=False", True),
        ("return", "return return", True),
        ("2.0", "3.0", False),
        ("zip(a", "zip(not a", False),
    ],
)
def test_annotations_checks_of_zip_and_what_is_no_python_are_no_mutants(was, now, same):
    assert mutants.same_meaning(SOURCE, SOURCE.replace(was, now)) == same


def test_the_quickest_tests_of_the_line_are_run_and_where_it_is_run_on_import_those_of_the_file():
    contexts = {1: [""], 2: ["a|run", "b|run", "b|setup", "failing|run"], 3: ["c|run"]}
    seconds = {"a": 2.0, "b": 1.0, "c": mutants.BUDGET}
    assert mutants.concerned(2, contexts, seconds) == ["b", "a"]
    assert mutants.concerned(1, contexts, seconds) == ["b", "a"], "no more than the budget"
    assert mutants.concerned(3, contexts, seconds) == ["c"]


def test_the_report_tells_the_share_killed_and_names_the_survivors():
    killed, survivor = (mutants.Mutant(f"{name}.py", 7, "a → b", "") for name in ("one", "two"))
    text, share = mutants.report([(killed, 3, False), (killed, 3, False), (survivor, 5, True)], 4)
    assert share == pytest.approx(2 / 3)
    assert "66.7% ± 13.6% (a standard error) of 3 mutants at 4 places" in text
    assert "| one.py | 2 | 2 |" in text
    assert text.endswith("- two.py:7 (5 tests) `a → b`\n")
    assert mutants.worded("x\n a < b\n", "x\n a > b\n") == "a < b → a > b"
