# %% [markdown]
# # An encoder of padded lines
#
# **What you get:** PyTorch's own `nn.TransformerEncoderLayer`, run until nothing changes, reads lines of different lengths
# and guesses hidden characters; a root finder that is fitted to it without labels, in which padding counts for nothing; what
# it saves, which is little (results/RESEARCH.md, 68, says why); and a line being read. The block was trained before (`python
# -m experiments workloads --only masked-encoder`), so this needs a clone of the repository. It takes about three minutes
# on a laptop's CPU.
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
from experiments.workloads.suite import MODELS, model_of
from experiments.workloads.texts import guessed, lines, plays

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)
model = model_of("masked-encoder", ROOT / MODELS)
f = model.deq.cell
print(f.layer.self_attn)

# %% [markdown]
# ## Lines with a mask
#
# A fifth of the characters is hidden. `mb.Padded(x, mask, y=...)` carries embeddings, the mask, which is True where a
# character is, and what we want to know for the metric.


# %%
def problems(split, count, longest=64):
    found = lines(split, 12, longest)[:: max(1, 4000 // count)][:count]
    mask = torch.arange(longest) < torch.tensor([len(line) for line in found]).unsqueeze(1)
    whole = torch.zeros(len(found), longest, dtype=torch.long)
    whole[mask] = torch.cat(found)
    hidden = (torch.rand(whole.shape) < 0.2) & mask
    hidden[:, 0] = True
    tokens = whole.masked_fill(hidden, len(plays().vocabulary))
    return tokens, model.inject(tokens, mask)._replace(y=whole.masked_fill(~hidden, -1))


_, seen = problems("train", 20 if QUICK else 400)
tokens, unseen = problems("test", 6 if QUICK else 64)
print(seen.x.shape, f"{seen.mask.double().mean():.0%} of the places are characters")

# %% [markdown]
# ## Fit a root finder to it
#
# The layout is "tokens", which the block says itself: its places see one another. `metric` tells what states are worth.


# %%
def metric(z, x):
    return guessed(model.head(z), x.y)


solver = mb.fit_solver(f, seen, rtol=1e-2, seconds=2 if QUICK else 90, fallback=False, progress=False)
comparison = mb.compare(
    f, unseen, solvers={"learned": solver}, tune_on=seen, rtol=(1e-1, 1e-2), metric=metric, rounds=1 if QUICK else 3,
    title="An encoder of padded lines", progress=False,
)  # fmt: skip
print(comparison)
comparison.plot_metric()
plt.show()

# %% [markdown]
# ## How much padding there is makes no difference
#
# The same lines in a wider frame: the same evaluations, the same states.

# %%
longest = int(unseen.mask.sum(1).max())
short = mb.Padded(unseen.x[:, :longest], unseen.mask[:, :longest])
one, other = (
    mb.solve(f, torch.zeros_like(x.x), x, solver=solver, rtol=1e-2, throw=False)
    for x in (short, mb.Padded(*unseen[:2]))
)
print(f"{longest} places: {one.nfe.double().mean():.1f} evaluations; 64: {other.nfe.double().mean():.1f}")
print(f"states differ by at most {float((one.z - other.z[:, :longest]).abs().max()):.1e}")

# %% [markdown]
# ## A line being read

# %%
with torch.no_grad():
    states = mb.solve(
        f, torch.zeros_like(unseen.x), unseen, solver=solver, rtol=0.0, max_nfe=9, throw=False, snapshots=(1, 2, 4, 8)
    ).snapshots
letters = [*plays().vocabulary, "_"]
row = int(unseen.mask.sum(1).argmax())
length = int(unseen.mask[row].sum())
print("read     ", "".join(letters[int(t)] for t in tokens[row, :length]))
for depth, z in zip((1, 2, 4, 8), states, strict=True):
    guess = torch.where(unseen.y[row] >= 0, model.head(z)[row].argmax(1), tokens[row])
    print(f"{depth} calls  ", "".join(letters[int(t)] for t in guess[:length]))
