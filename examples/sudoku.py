# %% [markdown]
# # A looped transformer on Sudoku
#
# **What you get:** a transformer block that is run until nothing changes solves Sudoku; a root finder that is fitted to it
# without labels; the share of puzzles solved after each evaluation of the block; and a picture of one puzzle being filled
# in. The block was trained before (`python -m experiments workloads --only sudoku`), so this needs a clone of the
# repository. It takes about three minutes on a laptop's CPU.
#
# `pip install "metabroyden[experiments]"`

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

here = Path(globals().get("__file__", "notebook")).resolve()
ROOT = next(folder for folder in here.parents if (folder / "experiments").is_dir())
sys.path.insert(0, str(ROOT))

import metabroyden as mb
from experiments.workloads.puzzles import puzzles
from experiments.workloads.suite import MODELS, model_of

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)
model = model_of("sudoku", ROOT / MODELS)
f = model.deq.cell
print(f)

# %% [markdown]
# ## The block
#
# Two layers over 81 tokens. Of six heads two see a cell's row, two its column, two its box, so that swapping rows of a
# band only moves the answers. It was trained through its equilibria; Picard's iteration, which is the plain loop, does not
# come to them within 60 rounds on half of the puzzles.


# %%
def solved(z, x):
    return (model.head(z).argmax(2) == x.y).all(1).double()


seen = model.inject(*puzzles(30 if QUICK else 600, seed=1))
clues, answers = puzzles(12 if QUICK else 128, seed=2, held=True)  # of other grids
unseen = model.inject(clues, answers)

# %% [markdown]
# ## Fit a root finder to it
#
# `fit_solver` takes the block and contexts, which are graphs: cells of one row, column or box have an edge, and the learned
# solver sends messages along it. The answers are there for the metric alone.

# %%
solver = mb.fit_solver(f, seen, rtol=1e-3, seconds=2 if QUICK else 90, fallback=False, progress=False)
comparison = mb.compare(
    f, unseen, solvers={"learned": solver}, tune_on=seen, rtol=(1e-2, 1e-3), metric=solved, rounds=1 if QUICK else 3,
    title="A looped transformer on Sudoku", progress=False,
)  # fmt: skip
print(comparison)
comparison.plot_metric()
plt.show()

# %% [markdown]
# ## A puzzle being filled in
#
# The one with fewest clues. These are black; what the model says of the other cells is green where it is right, else red.

# %%
depths = (1, 2, 4, 6, 10)
hardest = (clues > 0).sum(1).argmin()
figure, places = plt.subplots(2, len(depths), figsize=(2 * len(depths), 4.4), layout="constrained")
for line, (name, one) in zip(places, {"learned": solver, "Anderson": mb.Anderson()}.items(), strict=True):
    options = {"rtol": 0.0, "max_nfe": depths[-1] + 1, "throw": False, "snapshots": depths}
    states = mb.solve(f, torch.zeros_like(unseen.x), unseen, solver=one, **options).snapshots
    for place, depth, z in zip(line, depths, states, strict=True):
        guess, answer, clue = model.head(z)[hardest].argmax(1), answers[hardest], clues[hardest]
        place.set(xlim=(0, 9), ylim=(9, 0), xticks=[], yticks=[], aspect="equal", title=f"{name}, {depth}")
        for edge in range(10):
            width = 1.5 if edge % 3 == 0 else 0.4
            place.axhline(edge, color="black", linewidth=width)
            place.axvline(edge, color="black", linewidth=width)
        for cell in range(81):
            right = "tab:green" if guess[cell] == answer[cell] else "tab:red"
            color, digit = ("black", clue[cell] - 1) if clue[cell] else (right, guess[cell])
            place.text(
                cell % 9 + 0.5, cell // 9 + 0.55, int(digit) + 1, color=color, fontsize=7, ha="center", va="center"
            )
plt.show()
