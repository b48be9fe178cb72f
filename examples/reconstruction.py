# %% [markdown]
# # A picture from few measurements, with deepinv
#
# **What you get:** deepinv's proximal gradient descent with a small denoiser, made a deep equilibrium, reconstructs pictures
# from a third as many random sums as they have pixels; a root finder that is fitted to it without the true pictures, put
# into deepinv's model in one line; decibels after each evaluation, and the pictures side by side. The denoiser was trained
# before (`python -m experiments workloads --only sensing`), so this needs a clone of the repository. It takes about three
# minutes on a laptop's CPU.
#
# `pip install "metabroyden[experiments,deepinv]"`

# %%
import os
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

here = Path(globals().get("__file__", "notebook")).resolve()
ROOT = next(folder for folder in here.parents if (folder / "experiments").is_dir())
sys.path.insert(0, str(ROOT))

import metabroyden as mb
from experiments.workloads.imaging import TEST_ON, TRAIN_ON, psnr
from experiments.workloads.suite import MODELS, model_of

warnings.filterwarnings("ignore", message="IProgress")  # of a progress bar that deepinv imports
QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)
model = model_of("sensing", ROOT / MODELS)
algorithm, physics = model.algorithm, model.physics  # deepinv's own objects
print(type(algorithm).__name__, type(physics).__name__, type(model.denoiser).__name__)

# %% [markdown]
# ## The map and its problems
#
# `FixedPointMap` makes a map f(z, x) of deepinv's iteration; x is a tuple that begins with the measurements y. Here the true
# pictures stand last in it, for the metric alone.

# %%
f = mb.integrations.deepinv.FixedPointMap(algorithm, physics)
seen = model.problems(TRAIN_ON, 10 if QUICK else 200, 1)
unseen = model.problems(TEST_ON, 4 if QUICK else 32, 2)
print([tuple(part.shape) for part in unseen])

# %% [markdown]
# ## Fit a root finder to it
#
# f is dear, so that `seconds` decide how many problems and steps there are.

# %%
solver = mb.fit_solver(f, seen, rtol=1e-2, seconds=2 if QUICK else 90, fallback=False, progress=False)
comparison = mb.compare(
    f, unseen, solvers={"learned": solver}, tune_on=seen, rtol=1e-2, metric=psnr, rounds=1 if QUICK else 3,
    max_nfe=10 if QUICK else 60,
    title="Compressed sensing", progress=False,
)  # fmt: skip
print(comparison)
comparison.plot_metric()
plt.show()

# %% [markdown]
# ## In deepinv's model
#
# `install` makes the solver the engine of the model's forward pass, and of its gradients.

# %%
layer = mb.integrations.deepinv.install(algorithm, solver, rtol=1e-2)
y, clear = unseen
picture = algorithm(y[:4], physics)
print(f"{psnr(picture, (clear[:4],)).mean():.1f} dB after {layer.last_solution.nfe.double().mean():.1f} evaluations")

# %% [markdown]
# ## The pictures

# %%
depths = (2, 4, 8)
figure, places = plt.subplots(2, len(depths) + 1, figsize=(2 * len(depths) + 2, 4.3), layout="constrained")
for line, (name, one) in zip(places, {"learned": solver, "Anderson": mb.Anderson()}.items(), strict=True):
    options = {"rtol": 0.0, "max_nfe": depths[-1] + 1, "throw": False, "snapshots": depths}
    states = mb.solve(f, f.initial_state(unseen), unseen, solver=one, **options).snapshots
    line[0].set_title("true")
    for place, depth, z in zip(line[1:], depths, states, strict=True):
        place.set_title(f"{name}, {depth}: {float(psnr(z, unseen)[0]):.1f} dB", fontsize=9)
    for place, z in zip(line, (clear, *states), strict=True):
        place.imshow(z[0, 0].detach().clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        place.axis("off")
plt.show()
