"""What `pip install` installs: a wheel, built without the network, with all that it needs and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import metabroyden as mb

ROOT = Path(__file__).parents[1]
COPIED = ["pyproject.toml", "README.md", "LICENSE", "metabroyden", "experiments", "tests"]
UNWANTED = shutil.ignore_patterns("__pycache__", "*.egg-info")
PLATFORM = {name: os.environ[name] for name in ("SYSTEMROOT", "PATH") if name in os.environ}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources, so that what earlier builds left in the checkout is not in it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in COPIED:
        copy = shutil.copy if (ROOT / name).is_file() else lambda *two: shutil.copytree(*two, ignore=UNWANTED)
        copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, timeout=120)
    (made,) = target.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    (path,) = unpacked.glob("*.dist-info/METADATA")
    return Parser().parsestr(path.read_text(encoding="utf-8"))


def test_the_wheel_installs_the_command(unpacked):
    (path,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert path.read_text().split("\n")[:2] == ["[console_scripts]", "metabroyden = metabroyden.cli:main"]


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(wheel, unpacked):
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name.split("/")[0] for name in found} == {"metabroyden", f"metabroyden-{mb.__version__}.dist-info"}
    ours = {name for name in found if name.startswith("metabroyden/")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "metabroyden").rglob("*") if path.is_file()}
    assert ours == {name for name in there if "__pycache__" not in name}
    assert "metabroyden/py.typed" in ours
    weights = {name for name in ours if name.endswith("/model.safetensors")}
    assert len(weights) == 2 * len(mb.list_pretrained()) - 1
    assert wheel.stat().st_size < 2_600_000
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_says_what_it_is(metadata, unpacked):
    assert metadata["Version"] == mb.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", mb.__version__)
    assert metadata["Name"] == "metabroyden"
    assert metadata["License-Expression"] == "MIT"
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))
    assert metadata["Requires-Python"] == ">=3.11"
    kinds = {"Development Status", "Intended Audience", "Operating System", "Programming Language", "Topic", "Typing"}
    assert {line.split(" :: ")[0] for line in metadata.get_all("Classifier", [])} == kinds
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_all("Project-URL") is None, "none is known"


def test_inference_needs_three_packages_and_each_extra_what_it_is_for(metadata):
    needs: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == [\"'](\w+)", marker)
        needs.setdefault(extra[1] if extra else "", set()).add(re.match(r"[\w-]+", requirement)[0])  # type: ignore[index]
    assert needs[""] == {"torch", "numpy", "safetensors"}
    assert needs["train"] == {"higher", "rich"}
    assert needs["plot"] == {"matplotlib"}
    assert needs["deepinv"] == {"deepinv"}
    assert needs["physics"] == {"scipy", "pandapower", "epyt", "pyscf"}
    extras = {"train", "plot", "deepinv", "testbed", "physics", "zoo", "experiments"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    pinned = {
        re.match(r"[\w-]+", line)[0]
        for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()
        if line[:1].isalpha()
    }  # type: ignore[index]
    assert set().union(*needs.values()) - {"metabroyden"} <= pinned, "make installs them"


USED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in set("higher rich matplotlib tyro sklearn scipy tensorboard torchdeq torchdiffeq "
                                     "deepinv".split()):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, metabroyden as mb
from metabroyden.zoo.models import load_pretrained
print(mb.__file__, mb.__version__, *mb.list_pretrained(), sep="\\n")
solvers = [mb.load_solver(name) for name in mb.list_pretrained()]
model, image = load_pretrained("dense-digits"), torch.zeros(1, 1, 8, 8)
image[..., 1:7, 3:5] = 1
assert int(model(image).argmax()) == 1
"""


def test_the_wheel_serves_without_the_checkout_and_without_extras(unpacked, tmp_path):
    environment = {**PLATFORM, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-W", "error", "-c", USED]
    done: Any = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    file, version, *names = done.stdout.split("\n")[:-1]
    assert Path(file).is_relative_to(unpacked)
    assert version == mb.__version__
    assert tuple(names) == mb.list_pretrained()


def test_versions_and_changes_agree():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(\d[\d.]*)\]", changes, re.M)[1] == mb.__version__  # type: ignore[index]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mb.__version__}\n" in citation
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project, "it is taken from metabroyden/version.py"
