"""Sudoku by a looped transformer: one block of two layers, run until nothing changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import metabroyden as mb
from experiments.bench.runner import Row
from experiments.workloads.brought import Brought
from experiments.workloads.drawn import Drawn, trained
from metabroyden.zoo.models.fit import Training

CELLS, DIGITS = 81, 9
CONTEXTS = 600
TRAIN, TEST = 1, 2
"""Seeds of contexts to fit to, and of those to measure on."""
WORDS = (
    "a looped transformer, two layers whose heads see rows, columns and boxes, on Sudoku of 32 to 46 clues that singles "
    "solve; tested on other grids"
)
TRAINING = Training(
    epochs=20, batch=32, learning_rate=2e-3, warmup=0.03, pretrain=10, depth=8, least=2, weight_decay=0.01
)
GIVEN = (32, 46)
"""Fewest and most clues."""
GRIDS = 400
"""Solved grids that puzzles come from by symmetries; others for the test."""


def solved_grid(rng: np.random.Generator) -> np.ndarray:
    """(9, 9) digits 0 to 8: a random solved grid, by backtracking on the cell of the fewest candidates."""
    grid = np.full((9, 9), -1)
    free = np.ones((9, 9, 9), dtype=bool)

    def fill(free: np.ndarray) -> bool:
        empty = grid < 0
        if not empty.any():
            return True
        count = np.where(empty, free.sum(2), 10)
        row, column = divmod(int(count.argmin()), 9)
        for digit in rng.permutation(np.flatnonzero(free[row, column])):
            grid[row, column] = digit
            if fill(_without(free, row, column, digit)):
                return True
        grid[row, column] = -1
        return False

    fill(free)
    return grid


def _without(free: np.ndarray, row: int, column: int, digit: int) -> np.ndarray:
    left = free.copy()
    top, start = row // 3 * 3, column // 3 * 3
    left[row, :, digit] = left[:, column, digit] = left[top : top + 3, start : start + 3, digit] = False
    return left


def shuffled(grids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(B, 9, 9) the grids with digits renamed, rows, columns and their bands in another order, some transposed."""
    count = len(grids)

    def order() -> np.ndarray:
        bands, within = rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1), np.tile(np.arange(3), (count, 3, 1))
        return (3 * bands[:, :, None] + rng.permuted(within, axis=2)).reshape(count, 9)

    names = rng.permuted(np.tile(np.arange(9), (count, 1)), axis=1)
    grids = np.take_along_axis(names, grids.reshape(count, 81), 1).reshape(count, 9, 9)
    grids = np.take_along_axis(grids, order()[:, :, None], 1)
    grids = np.take_along_axis(grids, order()[:, None, :], 2)
    return np.where(rng.random((count, 1, 1)) < 0.5, grids.transpose(0, 2, 1), grids)


def easy(clues: np.ndarray) -> np.ndarray:
    """(B,) whether singles alone, naked and hidden, fill the grids (B, 9, 9), −1 where there is no clue."""
    now = clues.copy()
    for _ in range(CELLS):
        held = np.eye(9, dtype=bool)[now] & (now >= 0)[..., None]  # (B, 9, 9, digits)
        taken = held.any(2, keepdims=True) | held.any(1, keepdims=True) | _spread(_boxes(held).any(2))
        free = ~taken & (now < 0)[..., None]
        boxes = _boxes(free)
        lonely = (free.sum(2, keepdims=True) == 1) | (free.sum(1, keepdims=True) == 1) | _spread(boxes.sum(2) == 1)
        sure = free & (lonely | (free.sum(3, keepdims=True) == 1))
        found = sure.any(3)
        if not found.any():
            break
        now = np.where(found, sure.argmax(3), now)
    return (now >= 0).all((1, 2))


def _boxes(values: np.ndarray) -> np.ndarray:
    """(B, 9 boxes, 9 cells, digits) of (B, 9, 9, digits)."""
    return values.reshape(-1, 3, 3, 3, 3, 9).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 9, 9, 9)


def _spread(values: np.ndarray) -> np.ndarray:
    """(B, 9, 9, digits) of (B, 9 boxes, digits)."""
    return values.reshape(-1, 3, 3, 9).repeat(3, axis=1).repeat(3, axis=2)


@cache
def _grids(held: bool) -> np.ndarray:
    rng = np.random.default_rng(1 if held else 0)
    return np.stack([solved_grid(rng) for _ in range(GRIDS // 4 if held else GRIDS)])


def puzzles(count: int, seed: int, held: bool = False) -> tuple[Tensor, Tensor]:
    """(clues, answers), (B, 81) each: 0 for no clue, else the digit; answers from 0 to 8. Singles alone solve them."""
    rng, made = np.random.default_rng(seed), []
    kept = 0
    while kept < count:
        grids = _grids(held)
        grids = shuffled(grids[rng.integers(len(grids), size=2 * count)], rng)
        many = rng.integers(GIVEN[0], GIVEN[1] + 1, size=(2 * count, 1))
        shown = rng.permuted(np.tile(np.arange(CELLS), (2 * count, 1)), axis=1) < many
        clues = np.where(shown.reshape(-1, 9, 9), grids, -1)
        those = easy(clues)
        made.append((clues[those], grids[those]))
        kept += int(those.sum())
    given, whole = (np.concatenate(part)[:count].reshape(count, CELLS) for part in zip(*made, strict=True))
    return torch.from_numpy(given) + 1, torch.from_numpy(whole)


class Layer(nn.Module):
    """Post-norm transformer layer whose heads see a cell's row, its column or its box."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        """(B, 81, width), for a mask (heads, 81, 81)."""
        q, k, v = (each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in self.qkv(z).chunk(3, dim=2))
        heard = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.norm1(z + self.out(heard.transpose(1, 2).flatten(2)))
        return self.norm2(y + self.outer(functional.gelu(self.inner(y))))


class Block(nn.Module):
    """f(z, x) = layer₂(layer₁(z + x)), the same at every depth.

    Args:
        width: coordinates of a cell of the grid, divided by six heads.
    """

    layout = "graph"
    mask: Tensor  # (6, 81, 81) what each head sees
    edges: Tensor  # (2, E) from and to cells of one row, column or box

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, 6) for _ in range(2))
        place = torch.arange(CELLS)
        groups = torch.stack([place // 9, place % 9, place // 27 * 3 + place % 9 // 3])
        same = groups[:, :, None] == groups[:, None, :]
        self.register_buffer("mask", same.repeat_interleave(2, dim=0), persistent=False)
        self.register_buffer("edges", same.any(0).fill_diagonal_(False).nonzero().T.flip(0), persistent=False)

    def initial_state(self, x: mb.Graphs) -> Tensor:
        """Zeros, (B, 81, width)."""
        return torch.zeros_like(x.x)

    def forward(self, z: Tensor, x: mb.Graphs) -> Tensor:
        """f(z, x), (B, 81, width)."""
        z = z + x.x
        for layer in self.layers:
            z = layer(z, self.mask)
        return z


class Solver(nn.Module):
    """Clues (B, 81) ↦ logits (B, 81, 9) of the digits."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS + 1, width)
        self.deq: Any = mb.DEQ(
            Block(width), solver=mb.Picard(), backward=mb.Phantom(steps=4), rtol=1e-2, max_nfe=24, warn=False
        )
        self.head = nn.Linear(width, DIGITS)

    def inject(self, clues: Tensor, answers: Tensor | None = None) -> mb.Graphs:
        """The context of the equilibrium: embedded clues as nodes, with edges between cells of one row, column or box."""
        source, target = self.deq.cell.edges.unsqueeze(1).expand(-1, len(clues), -1)
        x, there = self.embed(clues), torch.ones_like(clues, dtype=torch.bool)
        return mb.Graphs(x, there, source, target, x.new_ones(len(clues), source.shape[1]), answers)

    def forward(self, clues: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.deq(self.inject(clues)))


def right(logits: Tensor, answers: Any) -> Tensor:
    """(B,) one where every cell of a puzzle is right."""
    return (logits.argmax(2) == answers).all(1).double()


@dataclass(frozen=True)
class Puzzles(Drawn):
    """All cells of a puzzle; the score is the share of puzzles that are right in each of them."""

    metric, higher, worth = "puzzles solved", True, staticmethod(right)

    def draw(self, split: str, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(clues, answers), (B, 81) each."""
        return puzzles(batch, int(torch.randint(2**40, (), generator=generator)), held=split != "train")

    @torch.no_grad()
    def score(self, model: Any, split: str) -> float:
        """Share solved of puzzles of other grids, the same ones whatever the split."""
        model.eval()
        clues, answers = puzzles(128, 77, held=True)
        return float(right(model(clues), answers).mean())


def build() -> Solver:
    """The untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Solver()


def train(model: Solver, path: Path) -> Row:
    """Train it; interrupted, it goes on from its last epoch, which is at `path`."""
    return trained(model, Puzzles(), TRAINING, path)


@torch.no_grad()
def bring(model: Solver, samples: int) -> Brought:
    """The block with embedded clues."""

    def contexts(count: int, seed: int, held: bool) -> mb.Graphs:
        return model.inject(*puzzles(count, seed, held))

    def solved(z: Tensor, x: mb.Graphs) -> Tensor:
        return right(model.head(z), x.y)

    train, test = contexts(CONTEXTS, TRAIN, False), contexts(samples, TEST, True)
    return Brought(model.deq.cell, train, test, solved, (mb.Broyden(), 300), slack=0.01)
