# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Residual experts: one layer for everybody, one expert on top
#
# In a mixture, several feed-forward layers (experts) stand side by side, and each token is sent to the best one or two
# (top-1, top-2). Two experts for a token are better than one. They also cost twice the traffic, because experts live on
# different devices, and every token travels to each of its experts and back. PR-MoE asks whether both experts have to
# be chosen. If one of them is the same for all tokens, it can stand on every device, and nothing has to travel there.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.figures import figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.moe import residual
from chapters.shared import moe_lab
from kernels import bench, cases, check

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# A token of Llama-7B is 4096 numbers of two bytes. It goes to k experts and comes back from k. That is little for one
# token and much for a batch, in every layer. Here is what a batch sends per layer when experts are spread over many
# devices, with two experts that are chosen, and with one that is chosen and one that is at home.

# %%
tokens = 2 ** np.arange(8, 15)
drawn, axes = figure(height=2.6)
for k, role, words in ((2, "baseline", "top-2"), (1, "method", "fixed layer and top-1")):
    axes.plot(tokens, tokens * k * 2 * 4096 * 2 / 1e6, **series(role), label=words)
axes.set(xlabel="tokens", ylabel="MB to experts and back", xscale="log", yscale="log", title="half the traffic")
legend(axes)
drawn

# %% [markdown]
# ## The idea
#
# The layer's output is a weighed sum of two branches, the expert's answer and the fixed layer's. The weights are two
# coefficients c that sum to 1: the softmax of two numbers, which a matrix of two rows makes from the token itself. So a
# layer can learn for which tokens it wants the expert, and for which it does without. Three tokens of two numbers each;
# on the left what the expert counts, on the right what the fixed layer does:

# %%
x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
weight, bias = np.array([[2.0, -1.0], [0.0, 1.0]]), np.zeros(2)
c = residual.coefficients(x, weight, bias)
print(c.round(2))
np.testing.assert_allclose(c.sum(axis=1), 1)

# %% [markdown]
# Softmax over two numbers is a sigmoid of their difference. That is more than a curiosity: the kernel below has to
# multiply each token by one row, not by two.

# %%
z = x @ (weight[0] - weight[1]) + bias[0] - bias[1]
np.testing.assert_allclose(c[:, 0], 1 / (1 + np.exp(-z)))

# %% [markdown]
# ## The mix
#
# Experts answer in their own order: first all tokens of expert 0, then those of expert 1. `source` says in which row a
# token finds its answer, and -1 that there is none, because its expert had no room. `gate` is what the router gives the
# expert's answer. A dropped token keeps its coefficients, so it gets less than the whole fixed layer. But it gets
# something: with top-1 alone it would get 0. Here the fixed layer answers 1 everywhere, the experts 10 and 20.

# %%
rows, mlp = np.array([[10.0, 10.0], [20.0, 20.0]]), np.ones((3, 2))
source, gate = np.array([1, -1, 0]), np.array([0.5, 0.9, 0.8])
y = residual.mix(x, weight, bias, rows, source, gate, mlp)
print(y.round(2))
np.testing.assert_allclose(y[0], c[0, 0] * 0.5 * 20 + c[0, 1] * 1)
np.testing.assert_allclose(y[1], c[1, 1] * 1)

# %% [markdown]
# How far can the coefficients go? Give the first of them a bias and see what the three tokens get. Far on the left
# all get 1, the fixed layer: this is the dense model. Far on the right they get their expert times its gate, and the
# dropped one nothing: this is a plain top-1 mixture.

# %%
shifts = np.linspace(-6, 6, 49)
lines = [residual.mix(x, weight, np.array([shift, 0.0]), rows, source, gate, mlp)[:, 0] for shift in shifts]
drawn, axes = figure(height=2.6)
roles = {"token 0": "method", "token 1, dropped": "accent", "token 2": "second"}
for token, (words, role) in zip(np.transpose(lines), roles.items(), strict=True):
    axes.plot(shifts, token, **series(role), markevery=8, label=words)
axes.set(xlabel="bias on the expert's coefficient", ylabel="output", title="from the dense layer to top-1")
legend(axes)
drawn

# %% [markdown]
# At the ends there is nothing left to mix, to the last bit.

# %%
dense = residual.mix(x, weight, np.array([-900.0, 900.0]), rows, source, gate, mlp)
alone = residual.mix(x, weight, np.array([900.0, -900.0]), rows, source, gate, mlp)
print(dense, alone, sep="\n")
assert (dense == mlp).all() and (alone[1] == 0).all() and (alone[0] == 10).all()

# %% [markdown]
# Two tokens in one row, an answer that is not there, a gate that is no number: refused.

# %%
bad = {"source": np.array([1, -1, 1])}, {"source": np.array([1, -1, 2])}, {"gate": gate * np.nan}
for changed in bad:
    given = {"rows": rows, "source": source, "gate": gate, "mlp": mlp} | changed
    try:
        residual.mix(x, weight, bias, **given)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Learning to mix
#
# What do the coefficients learn? One number per token decides it: does the gradient agree more with the expert's answer
# or with the fixed layer's? It is 0 where a coefficient is 0 or 1, so a layer that has made up its mind stays with it.
# `mix_backward` has all gradients by hand; here that of the bias is beside a difference quotient.

# %%
dy, step = np.ones_like(y), 1e-6
found = residual.mix_backward(dy, x, weight, bias, rows, source, gate, mlp)
nudged = residual.mix(x, weight, bias + np.array([step, 0.0]), rows, source, gate, mlp)
print(found.bias, (nudged - y).sum() / step)
np.testing.assert_allclose(found.bias[0], (nudged - y).sum() / step, rtol=1e-4)
assert found.gate[1] == 0 and found.weight.any()

# %% [markdown]
# ## The pyramid
#
# The second observation of the paper: experts in late layers help more than experts in early ones. So late layers get
# more. Here are three small models of four layers. All use as many weights for a token, and the first two hold as many:
# eight experts of full width, or a fixed layer and fifteen experts of half the width. The pyramid holds fewer.

# %%
names = ("top-1", "residual", "pyramid")
models = {name: [moe_lab.fresh(lab, residual.LAYERS[name], 50, seed=0)] for name in names}
held = {name: residual.sizes(model) for name, (model,) in models.items()}
for name, (all_weights, used) in held.items():
    print(f"{name:9} holds {all_weights:,} feed-forward weights and uses {used:,} for a token")
assert len({used for _, used in held.values()}) == 1
assert held["top-1"][0] == held["residual"][0] > held["pyramid"][0]

# %% [markdown]
# They have learned for fifty steps only, from random weights, so do not read much into their order. The recorded claim
# trains longer, three times, with top-2 and a pyramid that stands on its head beside them. On the right is what the
# layers have learned about their experts: the mean coefficient, ½ where both branches count alike.

# %%
found = {name: [lab.perplexity(model) for model in trained] for name, trained in models.items()}
assert all(values[0] < lab.config.vocab_size for values in found.values())
residual.draw(models, found, lab.validation[:16])

# %% [markdown]
# Means hide what tokens do. One sequence, layer by layer: how much of the expert does each token take? We listen to the
# coefficients of each layer.

# %%
model, seen = models["pyramid"][0], []
layers = [module for module in model.modules() if isinstance(module, residual.Residual)]
hooks = [layer.coefficient.register_forward_hook(lambda *given: seen.append(given[2])) for layer in layers]
shares = residual.expert_shares(model, lab.validation[:1, :48])
for hook in hooks:
    hook.remove()
each = torch.stack([logits.softmax(-1)[0, :, 0] for logits in seen]).numpy()
assert each.shape == (4, 48)
np.testing.assert_allclose(each.mean(axis=1), [share for share, _ in shares], rtol=1e-4)

# %% [markdown]
# In some layers all tokens take about the same, bright or dark from end to end: the layer has chosen. In others
# neighbouring tokens differ, which is what the coefficients are for.

# %%
drawn, axes = figure(width=8.0, height=2.4)
heatmap(axes, each, "share of the expert", limit=1)
axes.set(xlabel="token of the sequence", ylabel="layer", yticks=range(4))
drawn

# %% [markdown]
# ## What the claim found
#
# Three seeds, two hundred steps, and two controls: top-2, and the same pyramid with its experts in the early layers.
# The second half of the sentence says what became of the pyramid here. Four layers are few for one; the paper's models
# have 24.

# %%
outcome = claims.recorded("residual")
print(outcome["sentence"] if outcome else "not recorded yet: python -m chapters claim residual --full")
assert outcome is None or len(outcome["seeds"]) >= 3

# %% [markdown]
# As a picture, quality against size: at equal size the residual mixture is better than the plain ones, and both
# pyramids, with fewer weights, come close to it.

# %%
numbers = outcome["numbers"]
drawn, axes = figure(height=2.6)
roles = {"top-1": "baseline", "top-2": "muted", "residual": "method", "pyramid": "third", "upside down": "second"}
for name, role in roles.items():
    place = numbers[f"feed-forward weights, {name}"] / 1e3, numbers[f"perplexity, {name}"]
    axes.plot(*place, **(series(role) | {"linestyle": "", "markersize": 8}), label=name)
axes.set(xlabel="feed-forward weights (thousands)", ylabel="perplexity", xlim=(550, 950), ymargin=0.15)
legend(axes, loc="right")
drawn

# %% [markdown]
# ## The kernel, in bytes
#
# In plain torch the mix is a product with two columns, a softmax, a gather, three products and a sum. Each reads its
# operands and writes its result, about 12 rows a token. The kernel reads a token, its expert's answer and the fixed
# layer's answer once, and writes the sum. A program takes one token after the other and keeps the difference of the
# two weight rows in registers. While it adds up z it holds the other two rows already.

# %%
case = cases.cases("moe.residual")[0]
naive = 12 * 4096 * 4096 * 2
print(f"{case.name}: {case.bytes / 1e6:.0f} MB; one operator after the other: {naive / 1e6:.0f} MB")
assert 2.5 < naive / case.bytes < 3.5

# %% [markdown]
# What the compiler makes of it, seen without a GPU (here for an H100 or H200, sm_90):

# %%
report = check.static_report("moe.residual", [90])
for row in report:
    print(f"{row['case']:52} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch:

# %%
for row in bench.recorded("moe.residual"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("moe.residual"):
    print("not recorded yet: python -m kernels bench moe.residual, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the mix, its gradients, and the kernels of both.
#
# ```
# python -m chapters exercise residual --to my
# python -m pytest --submission my tests/moe/test_residual.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.moe
# chapters.moe.__path__.insert(0, "../../my/chapters/moe")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["residual"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["residual"])) == 4
