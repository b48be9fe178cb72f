# %% [markdown]
# # An implicit graph network
#
# **What you get:** a graph network whose nodes settle on a fixed point, a root finder that is fitted to it, and a
# picture of how far news has come along the edges after each evaluation. The cell is written as PyTorch Geometric wants
# it, `cell(z, x, edge_index)`; that package itself is not needed. It takes about two minutes on a laptop's CPU.
#
# `pip install "metabroyden[train]" matplotlib`

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import metabroyden as mb
from metabroyden.zoo.data.graphs import trees

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)
WIDTH, CLASSES = 32, 4


# %% [markdown]
# ## The cell
#
# Each node takes what comes from its neighbours, through weights whose rows add up to less than one, and adds its own
# input. News travels one edge an evaluation.


# %%
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH) + 0.01 * torch.randn(WIDTH, WIDTH))

    def forward(self, z, x, edge_index):
        source, target = edge_index
        degree = torch.zeros(len(z)).index_add(0, target, torch.ones(len(target))).clamp_min(1)
        weight = self.weight * (0.99 / self.weight.abs().sum(1, keepdim=True)).clamp_max(1)
        message = (z @ weight.T)[source] * (degree[source] * degree[target]).rsqrt()[:, None]
        return torch.relu(torch.zeros_like(z).index_add(0, target, message) + x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(CLASSES, WIDTH, bias=False)
        options = {"solver": mb.Anderson(), "backward": mb.Implicit(solver=mb.Anderson(), max_nfe=100)}
        self.deq = mb.DEQ(mb.OnGraphs(Cell()), rtol=1e-3, max_nfe=100, warn=False, **options)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def context(self, task):
        return mb.Graphs.of(self.stem(task.x), task.edge_index, task.batch, y=task.y)

    def forward(self, task):
        graphs = self.context(task)
        return self.head(graphs.nodes(self.deq(graphs)))


# %% [markdown]
# ## Trees
#
# Of the nodes of a random tree one in twenty knows the class of all. Every other node has to hear of it.

# %%
model = Network()
steps = 3 if QUICK else 200
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for step in range(steps):
    task = trees(8 if QUICK else 32, seed=1000 + step)
    logits = model(task)
    loss = nn.functional.cross_entropy(logits, task.y)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 40 == 0:
        right = (logits.argmax(1) == task.y).float().mean()
        print(f"step {step:3}: {right:.1%} right, {model.deq.last_solution.nfe.float().mean():.0f} evaluations")

# %% [markdown]
# ## Fit a root finder to it
#
# `fit_solver` takes the map and contexts, no labels. The learned solver sends messages along the same edges, several
# at a time.

# %%
model.eval().requires_grad_(False)
f = model.deq.cell
seen = model.context(trees(30 if QUICK else 600, seed=1))
unseen = model.context(trees(12 if QUICK else 128, seed=2))
solver = mb.fit_solver(f, seen, rtol=1e-3, seconds=2 if QUICK else 60, fallback=False, progress=False)


def accuracy(z, graphs):
    right = (model.head(z).argmax(2) == graphs.y) & graphs.mask
    return right.sum(1) / graphs.mask.sum(1)


comparison = mb.compare(
    f, unseen, solvers={"learned": solver}, tune_on=seen, rtol=1e-3, metric=accuracy, rounds=1 if QUICK else 3,
    title="An implicit graph network on trees", progress=False,
)  # fmt: skip
print(comparison)
comparison.plot_metric()
plt.show()

# %% [markdown]
# ## How far news has come
#
# Nodes by their distance, in edges, from the nearest one that knows. Anderson's method, as any solver that only sees f,
# reaches one edge further with every evaluation.


# %%
def distances(graphs):
    far = np.where(graphs.x.abs().sum(2) > 0, 0, 99)
    row, edge = np.nonzero((graphs.target < graphs.mask.shape[1]).numpy())
    source, target = graphs.source.numpy()[row, edge], graphs.target.numpy()[row, edge]
    for _ in range(60):
        np.minimum.at(far, (row, target), far[row, source] + 1)
    return torch.as_tensor(far)


far = distances(unseen)
depths = (1, 2, 3, 4, 6, 8, 10, 15, 20, 30)
figure, places = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
for place, (name, one) in zip(places, {"learned": solver, "Anderson": mb.Anderson()}.items(), strict=True):
    options = {"rtol": 0.0, "max_nfe": depths[-1] + 1, "throw": False, "snapshots": depths}
    states = mb.solve(f, torch.zeros_like(unseen.x), unseen, solver=one, **options).snapshots
    rows = []
    for z in states:
        right = (model.head(z).argmax(2) == unseen.y) & unseen.mask
        rows.append([right[far == step].float().mean().item() if (far == step).any() else np.nan for step in range(20)])
    image = place.imshow(np.array(rows).T, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
    place.set_xticks(range(len(depths)), depths)
    place.set(title=name, xlabel="evaluations of f", ylabel="edges to the nearest node that knows")
figure.colorbar(image, ax=places, label="share of nodes that are right")
plt.show()
