# %% [markdown]
# # Inside torchdeq
#
# **What you get:** an unmodified torchdeq model that runs with a learned root finder in less than a fifth of the time
# that torchdeq's Broyden takes, at the same accuracy; and a map of what each input costs. It takes about a minute on
# a laptop's CPU.
#
# `pip install "metabroyden[train]" torchdeq matplotlib`

# %%
import math
import os
import time

import matplotlib.pyplot as plt
import torch
import torchdeq
from torch import nn
from torch.nn import functional

import metabroyden as mb

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)

# %% [markdown]
# ## A torchdeq model
#
# It tells two spirals apart: x is a point of the plane, the state has 64 coordinates. Nothing in it is ours.


# %%
class Spirals(nn.Module):
    def __init__(self, width: int = 64, inner: int = 256):
        super().__init__()
        self.stem, self.head = nn.Linear(2, width), nn.Linear(width, 2)
        self.block = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.norm = nn.LayerNorm(width)
        self.deq = torchdeq.get_deq(f_solver="anderson", f_tol=1e-3, f_stop_mode="rel", f_max_iter=40, grad=2)

    def forward(self, points):
        x = self.stem(4 * points)
        self.f = lambda z: self.norm(torch.relu(self.block(z) + x))
        self.states, self.info = self.deq(self.f, torch.zeros_like(x))
        return self.head(self.states[-1])


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    radius, label = torch.rand(count).sqrt(), torch.randint(2, (count,))
    angle = 3 * math.pi * radius + math.pi * label
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return points + 0.02 * torch.randn(count, 2), label


# %%
model = Spirals()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-3)
for step in range(5 if QUICK else 300):
    points, label = spirals(32 if QUICK else 192)
    anywhere = 2.2 * torch.rand(64, 2) - 1.1  # keeps the fixed points of other inputs easy to find, too
    logits = model(torch.cat([points, anywhere]))[: len(points)]
    z = model.states[-1].detach().requires_grad_()
    loss = functional.cross_entropy(logits, label) + 3 * torchdeq.loss.jac_reg(model.f(z), z)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")

# %% [markdown]
# ## Fit, register, run
#
# `fit_solver` takes the model and its raw inputs; it finds the DEQ inside by itself. `register` makes the solver
# known to torchdeq by a name.

# %%
model.eval().requires_grad_(False)
points = 2.2 * torch.rand(60 if QUICK else 2000, 2) - 1.1
solver = mb.fit_solver(model, points, rtol=1e-3, seconds=2 if QUICK else 45, fallback=False, progress=False)
mb.integrations.torchdeq.register("learned", solver)

# %% [markdown]
# ## What it saves
#
# `get_deq(f_solver="learned")` builds a new model with it. In one that is there, set the attribute. Here all three
# solvers run on new points. `rel_trace` of torchdeq's info has the relative residual after each evaluation, so the
# first that is below the tolerance says how many a point needs.

# %%
test, label = spirals(100 if QUICK else 2000)
solvers = {"torchdeq's Broyden": "broyden", "torchdeq's Anderson": "anderson", "learned": "learned"}
for name, f_solver in solvers.items():
    model.deq.f_solver = torchdeq.solver.get_solver(f_solver)
    seconds = []
    for _ in range(1 if QUICK else 5):
        begun = time.perf_counter()
        right = model(test).argmax(dim=1) == label
        seconds.append(time.perf_counter() - begun)
    solved = (model.info["rel_lowest"] <= 1e-3).double().mean()
    time_taken = sorted(seconds)[len(seconds) // 2]
    print(f"{name:20} accuracy {right.double().mean():.1%}, {solved:.1%} solved, {1e3 * time_taken:5.0f} ms")

# %% [markdown]
# Where the model has to think: left its answer, then the evaluations that each point of the plane takes (in the titles, the
# mean).

# %%
side = 12 if QUICK else 80
axis = torch.linspace(-1.1, 1.1, side)
plane = torch.cartesian_prod(axis, axis).flip(1)
figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
axes[0].imshow(
    model(plane).softmax(dim=1)[:, 1].reshape(side, side), extent=(-1.1, 1.1) * 2, origin="lower", cmap="RdBu"
)
axes[0].scatter(*test.T, c=label, s=1, cmap="gray")
axes[0].set_title("what the model says")
for ax, (name, f_solver) in zip(axes[1:], solvers.items(), strict=True):
    model.deq.f_solver = torchdeq.solver.get_solver(f_solver)
    model(plane)
    reached = model.info["rel_trace"] <= 1e-3
    evaluations = torch.where(reached.any(dim=1), reached.double().argmax(dim=1) + 1, 40)
    cost = evaluations.reshape(side, side)
    image = ax.imshow(cost, extent=(-1.1, 1.1) * 2, origin="lower", vmin=0, vmax=25, cmap="viridis")
    ax.set_title(f"{name}: {evaluations.double().mean():.1f}")
figure.colorbar(image, ax=axes[1:], label="evaluations")
for ax in axes:
    ax.set(xticks=[], yticks=[])
plt.show()
