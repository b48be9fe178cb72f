"""Imports point one way, and inference needs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metabroyden

PACKAGE = Path(metabroyden.__file__).parent

# A module may import from its own layer and from earlier ones, never from later ones.
LAYERS = [
    ["deprecated", "foreign", "padded", "progress", "solution", "state", "shared", "storage", "version"],
    ["function"],
    ["evaluator", "inverse"],
    ["problem", "opaque"],
    ["solver"],
    ["chunk"],
    ["solve"],
    ["fixed"],
    ["solvers"],
    ["nn"],
    ["learned", "checkpoint", "described", "folder", "resume"],  # a learned solver saves itself
    ["gradients"],
    ["deq"],
    ["comparison"],
    ["convert"],
    ["meta"],
    ["integrations"],
    ["compare", "template", "userfunction"],
    ["cli", "__main__"],
    ["zoo"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py"]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports at run time (what stands under TYPE_CHECKING is for readers)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names if child.module == "metabroyden")
            elif isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def area(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_layer_and_earlier_ones(path):
    own = RANK[area(path)]
    for name in imported(path):
        assert not name.startswith("experiments"), f"{path} imports {name}"
        if name.startswith("metabroyden."):
            assert RANK[name.split(".")[1]] <= own, f"{path} (layer {own}) imports {name}"


BENCH = PACKAGE.parent / "experiments" / "bench"


@pytest.mark.parametrize("path", sorted(BENCH.glob("*.py")), ids=lambda path: path.name)
def test_the_bench_imports_no_experiment(path):
    ours = {name for name in imported(path) if name.startswith("experiments.")}
    assert all(name.startswith("experiments.bench") for name in ours)


def test_inference_needs_torch_numpy_and_safetensors_only():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in set(
            "higher learn2learn matplotlib rich tyro sklearn torchdeq torchdiffeq scipy".split()
        ):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, metabroyden as mb
from metabroyden.learned import GroupedConfig
f = lambda z, x: torch.tanh(0.5 * z + x)
x = torch.randn(4, 6)
for solver in (mb.Broyden(), mb.GroupedLSTM(GroupedConfig(layout="vector", shape=(6,)))):
    assert mb.solve(f, torch.zeros(4, 6), x, solver=solver).converged.all()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_the_flagship_is_exported():
    for name in ("MetaBroyden", "Universal", "HyperAnderson", "Layout", "TaskSet", "MetaTrainer", "MetaConfig"):
        assert name in metabroyden.__all__
        assert hasattr(metabroyden, name)


def test_importing_takes_under_two_cpu_seconds_beyond_torch_and_loads_nothing_of_the_zoo():
    code = """
import sys, torch, time
began = time.process_time()
import metabroyden
took = time.process_time() - began
assert not [name for name in sys.modules if name.startswith("metabroyden.zoo")]
print(took)
"""
    run = lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: E731
    assert min(float(run().stdout) for _ in range(2)) < 2
