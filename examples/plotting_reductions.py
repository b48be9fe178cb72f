# %% [markdown]
# # Plotting reductions
#
# **What you get:** a trained solver from the package against tuned classical ones, in four figures: how many
# evaluations it saves, how the residual falls, where the time goes, and what accuracy a budget buys. It takes under a
# minute on a laptop's CPU.
#
# `pip install "metabroyden[train]" scikit-learn matplotlib`

# %%
import os

import matplotlib.pyplot as plt
import torch

import metabroyden as mb
from metabroyden.zoo.data.digits import load_digits
from metabroyden.zoo.models import load_pretrained

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
images = 40 if QUICK else 200

# %% [markdown]
# ## A model and its solver
#
# `mb.list_pretrained()` names the solvers that come with the package. `load_pretrained` gives the DEQ that one
# belongs to, here a classifier of scikit-learn's 8 × 8 digits. With a model of your own, everything below is the
# same.

# %%
print(mb.list_pretrained())
model = load_pretrained("conv-digits").requires_grad_(False)
data = load_digits()

# %% [markdown]
# ## Compare
#
# The map is f(z, x), where x may be a tuple or a dict of tensors with the samples first. Here the labels travel
# along, so that the metric can see them. The options of Picard, Anderson and Broyden are chosen on validation images,
# and all is measured on test images.

# %%
cell = model.cell


def contexts(part):
    return model.inject(part.images[:images]), part.labels[:images]


comparison = mb.compare(
    lambda z, x: cell(z, x[0]),
    contexts(data.test),
    z0=lambda x: torch.zeros_like(x[0]),
    tune_on=contexts(data.validation),
    solvers={"MetaBroyden": mb.load_solver("conv-digits"), "Universal": mb.load_solver("universal")},
    metric=lambda z, x: (model.classify(z).argmax(dim=1) == x[1]).double(),
    rounds=1 if QUICK else 5,
    title="conv-digits",
    progress=False,
)
print(comparison)

# %% [markdown]
# ## Four figures
#
# Each method draws on new axes, or on those that it is given. A solver keeps its colour in all of them.

# %%
comparison.plot_reduction()
plt.show()

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
comparison.plot_residual(ax=axes[0])
comparison.plot_time(ax=axes[1], rtol=1e-3)
comparison.plot_metric(ax=axes[2])
axes[2].set_ylabel("accuracy")
plt.show()

# %% [markdown]
# ## Files
#
# One call writes a page (`report.html`), its text, all figures as PNG and PDF, and the numbers.
# `mb.Comparison.from_json` reads them again and draws without solving.

# %%
print(comparison.save("runs/conv-digits"))
again = mb.Comparison.from_json("runs/conv-digits/comparison.json")
print(
    again.outcome("MetaBroyden", 1e-3).median,
    "evaluations;",
    again.best_classical(1e-3),
    "is the best classical solver",
)
