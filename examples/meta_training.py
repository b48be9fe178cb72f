# %% [markdown]
# # A meta-training experiment
#
# **What you get:** the coordinatewise LSTM of *Learning to learn by gradient descent by gradient descent* (Andrychowicz
# et al. 2016), trained to solve fixed points; `MetaBroyden`, trained by the same lines; their curves in TensorBoard; and a
# comparison. In evaluations the LSTM beats the plain iteration but not Broyden's method, and MetaBroyden beats all. It takes
# about a minute on a laptop's CPU.
#
# `pip install "metabroyden[train]" tensorboard matplotlib`

# %%
import os

import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import metabroyden as mb
from metabroyden.integrations import TensorBoardLogger

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)

# %% [markdown]
# ## Tasks
#
# A task is a fixed-point problem z = f(z, x) of one DEQ. Here f(z, x) = tanh(Wz + x) with ‖W‖ = 2.5, for which the
# plain iteration z ← f(z, x) often fails, and x is what a stem makes of four numbers. `TaskSet` keeps training,
# validation and test inputs apart.

# %%
width = 48
W = torch.randn(width, width)
W = 2.5 * W / torch.linalg.matrix_norm(W, 2)
stem = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width)).requires_grad_(False)


def f(z, x):
    return torch.tanh(z @ W + x)


train, validation, test = torch.randn(2500, 4).split([2000, 250, 250])
tasks = mb.TaskSet(f, train, validation, test, encode=lambda inputs: 4 * stem(inputs))

# %% [markdown]
# ## Training
#
# In each outer step the solver makes 14 steps on 32 problems, and backpropagation through all of them (by
# [higher](https://github.com/facebookresearch/higher)) gives the gradient of a weighted sum of log residuals. There
# are no labels. The LSTM has 690 weights, shared by all coordinates.

# %%
lstm = mb.CoordinatewiseLSTM(layout="vector", shape=(width,), initializer_width=0)
flagship = mb.MetaBroyden(layout="vector", shape=(width,))
learned = {"coordinatewise LSTM": lstm, "MetaBroyden": flagship}

steps = 6 if QUICK else 300
config = mb.MetaConfig(steps=steps, unroll=14, batch=32, backend="higher", validate_every=max(1, steps // 15))
for name, solver in learned.items():
    trainer = mb.MetaTrainer(solver, tasks, config)
    with TensorBoardLogger(f"runs/{name}") as logger:
        trainer.curves = lambda step, values, logger=logger: logger.log(values, step)
        trainer.run()
    print(f"{name}: {trainer.best_score:.1f} evaluations on validation")

# %% [markdown]
# `tensorboard --logdir runs` shows the curves. The same from the files:

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name in learned:
    events = EventAccumulator(f"runs/{name}").Reload()
    for ax, curve in zip(axes, ("loss", "evaluations on validation"), strict=True):
        found = events.Scalars(curve)
        ax.plot([event.step for event in found], [event.value for event in found], label=name)
        ax.set(xlabel="outer step", ylabel=curve)
axes[1].legend()
plt.show()

# %% [markdown]
# ## What they have learned
#
# `mb.compare` runs both on the test problems, which no training has seen, beside classical solvers tuned on the
# validation problems.

# %%
comparison = mb.compare(
    f,
    tasks.problems("test")[1],
    tune_on=tasks.problems("validation")[1],
    solvers=learned,
    rtol=1e-3,
    rounds=1 if QUICK else 5,
    progress=False,
)
print(comparison)
comparison.plot_residual()
plt.show()

# %% [markdown]
# No weight of the LSTM belongs to a coordinate, so it runs on states of any width. On a DEQ twice as wide, without
# training:

# %%
wide = torch.randn(2 * width, 2 * width)
wide = 2.5 * wide / torch.linalg.matrix_norm(wide, 2)
x = torch.randn(250, 2 * width)
for name, solver in {"Picard": mb.Picard(), "coordinatewise LSTM": lstm}.items():
    solution = mb.solve(
        lambda z, x: torch.tanh(z @ wide + x), torch.zeros_like(x), x, solver=solver, max_nfe=60, throw=False
    )
    print(f"{name:20} {solution.nfe.double().mean():5.1f} evaluations, {solution.converged.double().mean():.1%} solved")
