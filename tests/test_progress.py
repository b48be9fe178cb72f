"""Progress bars: shown where they can be, and silent where not."""

from __future__ import annotations

import sys

import pytest

from metabroyden.progress import progress_bar, ticks


def test_a_bar_says_how_far_the_work_is(capsys):
    with ticks("working", 3, show=True) as done:
        for _ in range(3):
            done()
    assert "3/3" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["rich", "rich.console", "ipywidgets"])
def test_where_no_bar_can_be_shown_nothing_is_printed_or_warned(missing, monkeypatch, capsys):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setitem(sys.modules, missing, None)
    with progress_bar("working", 3) as bar:
        assert bar is None
    assert capsys.readouterr() == ("", "")
