# %% [markdown]
# # A DEQ-Transformer with its solver
#
# **What you get:** a character model with one block of self-attention, solved to its fixed point; a root finder fitted to
# it; and a text that it writes. The learned solver saves one evaluation in six here, and no time: this block needs only
# eleven, and Transformers are what learned solvers find hardest. It takes about two minutes on a laptop's CPU.
#
# `pip install "metabroyden[train]" matplotlib`

# %%
import os
from pydoc_data.topics import topics  # the language reference, which comes with Python

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional

import metabroyden as mb

QUICK = os.environ.get("METABROYDEN_EXAMPLES") == "quick"  # for the tests
torch.manual_seed(0)

# %% [markdown]
# ## Text

# %%
text = " ".join(" ".join(topics.values()).lower().split())
letters = sorted(sorted(set(text)), key=text.count, reverse=True)[:48]
number = {letter: index for index, letter in enumerate(letters)}
tokens = torch.tensor([number[letter] for letter in text if letter in number])
train, test = tokens[:-40000], tokens[-40000:]
length = 32


def windows(tokens: torch.Tensor, count: int) -> torch.Tensor:
    return tokens[torch.randint(len(tokens) - length - 1, (count, 1)) + torch.arange(length + 1)]


# %% [markdown]
# ## The model
#
# The state z has a vector for each token, and the injection x is added at every depth (Bai, Kolter & Koltun 2019).
# `layout` tells solvers that axis 1 is time and axis 2 are channels, so that none looks into the future.


# %%
class Block(nn.Module):
    layout = "ntc"

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z, x):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(z + x).chunk(3, dim=2))
        heard = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        y = self.norm1(z + x + self.out(heard))
        return self.norm2(y + self.feed(y))


class LanguageModel(nn.Module):
    def __init__(self, width: int = 48):
        super().__init__()
        self.embed, self.head = nn.Embedding(len(letters), width), nn.Linear(width, len(letters))
        self.place = nn.Parameter(0.5 * torch.randn(length, width))
        gradients = mb.Implicit(solver=mb.Broyden(), rtol=3e-2, max_nfe=12)
        self.deq = mb.DEQ(Block(width), solver=mb.Broyden(), backward=gradients, rtol=1e-2, max_nfe=30, warn=False)

    def inject(self, tokens):
        return 2 * (self.embed(tokens) + self.place[: tokens.shape[1]])

    def forward(self, tokens):
        return self.head(self.deq(self.inject(tokens)))


# %%
model = LanguageModel()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for step in range(4 if QUICK else 500):
    batch = windows(train, 4 if QUICK else 32)
    x = model.inject(batch[:, :-1])
    z = model.deq(x)
    loss = functional.cross_entropy(model.head(z).flatten(0, 1), batch[:, 1:].flatten())
    penalty = mb.jacobian_penalty(model.deq.cell, z.detach(), x)
    optimizer.zero_grad()
    (loss + 0.05 * penalty).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:3}: loss {loss.item():.2f}, {model.deq.last_solution.nfe.double().mean():.1f} evaluations")

# %% [markdown]
# ## Its solver
#
# `fit_solver` takes the whole model, and tokens. `fallback=False` returns the learned solver whether or not it pays,
# for us to see.

# %%
model.eval().requires_grad_(False)
examples = windows(train, 40 if QUICK else 1000)[:, :-1]
solver = mb.fit_solver(model, examples, rtol=1e-3, seconds=2 if QUICK else 60, fallback=False, progress=False)

held_out = windows(test, 20 if QUICK else 128)[:, :-1]
rounds = 1 if QUICK else 5
comparison = mb.compare(model, held_out, solvers={"learned": solver}, rtol=1e-3, rounds=rounds, progress=False)
print(comparison)

figure, axes = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
comparison.plot_residual(ax=axes[0])
comparison.plot_reduction(ax=axes[1])
plt.show()

# %% [markdown]
# ## The same model, with either solver

# %%
batch = windows(test, 64)
for name, used in {"Broyden": mb.Broyden(), "learned": solver}.items():
    model.deq.solver, model.deq.rtol = used, 1e-3
    loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    print(f"{name}: loss {loss:.4f}, {model.deq.last_solution.nfe.double().mean():.1f} evaluations a window")

# %% [markdown]
# What it writes with the learned solver:

# %%
written = test[:length].tolist()
for _ in range(10 if QUICK else 200):
    likely = model(torch.tensor([written[-length:]]))[0, -1].mul(1.3).softmax(dim=0)
    written.append(int(likely.multinomial(1)))
print("".join(letters[token] for token in written))
