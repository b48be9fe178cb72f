"""The suite itself: what may be skipped, and whose warnings are errors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import metabroyden as mb
from tests import conftest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]


def test_a_skip_of_a_test_that_is_not_marked_cuda_is_a_failure(pytester):
    pytester.makepyfile(
        test_one="""
        import pytest
        def test_body(): pytest.skip("no browser")
        @pytest.mark.skipif(True, reason="no data")
        def test_mark(): pass
        @pytest.fixture
        def missing(): pytest.skip("no package")
        def test_fixture(missing): pass
        @pytest.mark.cuda
        def test_gpu(): pytest.skip("no GPU")
        @pytest.mark.xfail
        def test_expected(): assert False
        def test_good(): pass
        """,
        test_module='import pytest; pytest.importorskip("no_such_package")',
    )
    pytester.makeini("[pytest]\nmarkers = cuda")
    options = ["--real-data", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    result = pytester.runpytest_inprocess("-p", "tests.conftest", *options)
    result.assert_outcomes(passed=1, failed=1, errors=3, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines_random(["*no browser*Only tests marked cuda may be*", "*no data*", "*no package*"])


@pytest.mark.parametrize("module", ["metabroyden", "metabroyden.solve", "experiments.meta", "tests.test_solve"])
def test_a_warning_in_our_own_modules_is_an_error(module):
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "file.py", 1, module=module, registry={})


@pytest.mark.parametrize("layers", [1, 2])
def test_a_warning_of_our_layers_is_an_error_wherever_in_a_model_they_stand(layers):
    model = mb.DEQ(Repelled(), max_nfe=2)
    for _ in range(layers - 1):
        model = torch.nn.Sequential(model)
    with pytest.raises(UserWarning, match="DEQ: "):
        model(torch.ones(2, 3))


class Repelled(torch.nn.Module):
    def forward(self, z, x):
        return 3 * z + x


def test_a_warning_of_another_package_is_no_error_when_it_runs_or_is_compiled():
    """A package whose bytecode is not there yet is compiled at its first import, and warns of its strings then."""
    installed = ROOT / ".venv" / "lib" / "python3.11" / "site-packages"
    with warnings.catch_warnings(record=True) as said:
        warnings.warn_explicit("theirs", UserWarning, "file.py", 1, module="higher.optim", registry={})
        compile(r"'\d'", str(installed / "higher" / "optim.py"), "exec")
    assert len(said) == 2
    with pytest.raises(SyntaxError, match="invalid escape sequence"):
        compile(r"'\d'", str(ROOT / "metabroyden" / "solve.py"), "exec")


@pytest.mark.parametrize("compiler", ["/usr/bin/cc", None])
def test_learn2learn_may_be_missing_only_where_there_is_no_compiler(monkeypatch, pytestconfig, compiler):
    monkeypatch.setattr(conftest, "find_spec", lambda name: None)
    monkeypatch.setattr(conftest.shutil, "which", lambda name: compiler)
    assert ("learn2learn" in conftest.left_out(pytestconfig)) == (compiler is None)
