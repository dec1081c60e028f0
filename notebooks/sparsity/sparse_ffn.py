# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Sparse feed-forward: ask first, then read
#
# For each token that it writes, a model reads every weight of its feed-forward layers, and these are most of its
# weights. Much of what is computed from them is zero. This notebook lets a small controller say beforehand which
# neurons will be needed, and counts what is then read.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared import small_models
from chapters.sparsity import sparse_ffn
from kernels import bench, cases, check
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# The base model has SwiGLU layers, whose neurons are hardly ever exactly 0. So we need a small model with ReLU layers,
# trained for a few seconds on the same text.

# %%
layers = sparse_ffn.contenders(64, n=8)
dense = small_models.fresh(lab, layers["dense"][0], 60)
name = "blocks.0.feed_forward.down_proj"
hidden = torch.cat([x for _, x in surgery.record_inputs(dense, lab.validation[:8], [name])])

# %% [markdown]
# How many of its neurons does a token really use? On the left the neurons of its first layer, white where one is 0: a
# row for each token. On the right how many are. For each token a large part of the neurons is 0, and their rows of the
# second matrix were read for nothing.

# %%
zeros = (hidden == 0).double().mean(-1).flatten().numpy()
drawn, (left, right) = panels(2, width=8.4, height=2.6)
left.imshow(hidden[0, 20:60, :96] > 0, cmap="Greys", interpolation="nearest", aspect="auto")
left.set(xlabel="neuron", ylabel="token", xticks=[], yticks=[], title="black: not 0")
right.hist(100 * zeros, bins=30, color=COLOURS["method"])
right.set(xlabel="neurons that are 0 (%)", ylabel="tokens", title=f"{zeros.mean():.0%} in the mean")
assert 0.2 < zeros.mean() < 0.9
drawn

# %% [markdown]
# But which ones? A neuron's sum is known only after its row of the first matrix was read, and another set is 0 for the
# next token. Is any neuron 0 for every token, so that it could be dropped for good? In this first layer hardly one.

# %%
never = (hidden == 0).flatten(0, 1).all(0).double().mean().item()
print(f"{zeros.mean():.0%} of the neurons are 0 for a token, {never:.0%} for every token")
assert never < zeros.mean() / 2

# %% [markdown]
# ## A controller
#
# Let another layer guess before anything is read. The neurons stand in blocks of n. Two thin matrices, one after the
# other, give each neuron a logit, and in each block the neuron with the largest one is chosen: one in n is computed,
# the others count as 0. Here are 6 neurons in 2 blocks of n = 3, and a controller of rank 2, the width between its
# matrices.

# %%
rng = np.random.default_rng(0)
x, first, second = rng.normal(size=(4, 5)), rng.normal(size=(2, 5)), rng.normal(size=(6, 2))
logits = sparse_ffn.controller_logits(x, first, second, np.zeros((2, 3)))
chosen = sparse_ffn.choose(logits)
print(chosen)  # a row for each token, a column for each block
assert chosen.shape == (4, 2) and chosen.max() < 3

# %% [markdown]
# The chosen neuron of each block is computed, and only its row of either matrix is looked at. To see that, all rows
# that no token chose become NaN, and none comes out.

# %%
up, down = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
rows = sparse_ffn.chosen_rows(chosen, 6)
unread = np.setdiff1d(np.arange(6), rows)
up[unread] = down[unread] = np.nan
y = sparse_ffn.combine(sparse_ffn.active(x, up, chosen), chosen, down)
print(f"rows {np.unique(rows)} are read, rows {unread} are not")
assert np.isfinite(y).all()

# %% [markdown]
# It is the same as computing everything and multiplying by a mask of ones and zeros, which is how it is trained. The
# mask stands before the ReLU.

# %%
mask = np.eye(3)[chosen]  # [tokens, blocks, n]
full_up, full_down = np.nan_to_num(up), np.nan_to_num(down)
np.testing.assert_allclose(y, sparse_ffn.every_unit(x, full_up, full_down, mask), atol=1e-12)

# %% [markdown]
# ## How it learns
#
# An argmax has no gradient. In training the mask is mostly soft: the softmax of each block. In three of ten steps it is
# hard (1 for the chosen neuron, 0 for the others), and the gradient is taken as if it had been soft: straight through.
# Hard choices get a little noise, times a factor called temperature, so that a close second is tried, too. How often is
# the second taken, if its logit is behind by some distance?

# %%
gap = np.linspace(0, 1, 21)
pairs = np.repeat(np.stack((gap, 0 * gap), axis=-1)[:, None], 400, axis=1)  # [gaps, draws, 2 places]
uniform = rng.uniform(1e-6, 1 - 1e-6, pairs.shape)
drawn, axes = figure(height=2.6)
for temperature, role in ((0.1, "method"), (0.5, "second"), (1.0, "third")):
    hard = sparse_ffn.training_mask(pairs, uniform, True, temperature)
    axes.plot(gap, hard[..., 1].mean(1), **series(role), label=f"noise × {temperature}")
axes.set(xlabel="distance of the two logits", ylabel="share of draws", ylim=(0, 0.8), title="is the second taken?")
legend(axes, ncols=3)
drawn

# %% [markdown]
# The temperature scales the noise alone. Were logits plus noise divided by it, as is usual for a Gumbel softmax, the
# largest would be the same at any temperature. At 0.1 a lead of 1 is safe.

# %%
hard = sparse_ffn.training_mask(pairs[-1:], uniform[-1:], True, 0.1)
assert hard[..., 1].mean() < 0.01
told = torch.from_numpy(logits).requires_grad_()
noise = torch.from_numpy(rng.uniform(0.01, 0.99, logits.shape))
straight = sparse_ffn.drawn_mask(told, noise, True)
(slope,) = torch.autograd.grad((straight * torch.arange(3.0)).sum(), told)
assert set(straight.detach().flatten().tolist()) == {0.0, 1.0} and (slope != 0).all()

# %% [markdown]
# ## In the model
#
# The model is built with this layer in the place of its dense one (`feed_forward` says which to build). With fewer
# tokens than n it gathers the chosen rows; with more, it computes all and masks. Both give the same logits.

# %%
sparse = small_models.fresh(lab, layers["sparse"][0], 60)
tokens = lab.validation[:1, :40]
with torch.no_grad():
    whole, short = sparse(tokens), sparse(tokens[:, :5])
assert torch.allclose(whole[:, :5], short, rtol=1e-3, atol=1e-3)

# %% [markdown]
# Which neuron of a block is taken, and how often? With even choices all cells would be at 1/8. But nothing in the
# method asks for a balance. A column with one bright cell is a block that nearly always makes the same choice, and the
# dark cells are neurons that nobody asks for.


# %%
def favourites(layer=2):
    shares = sparse_ffn.usage(sparse, lab.validation, layer)
    assert np.allclose(shares.sum(1), 1)
    drawn, axes = figure(height=2.6)
    heatmap(axes, shares.T, "share of the tokens", limit=1)
    axes.set(xlabel="block", ylabel="neuron of the block", title=f"layer {layer}: a controller has favourites")
    return drawn


explore(favourites, layer=list(range(lab.config.layers)))

# %% [markdown]
# ## What is read
#
# A token reads one row in n of both matrices, and the controller. The controller is not free: with its rank at the
# width over n, as in the paper, and four neurons for each input, it adds five eighths of what the rows cost. So n = 8
# reads not an eighth but a fifth.

# %%
sizes = [2, 4, 8, 16, 32, 64]
read = [sparse_ffn.numbers_read(4096, 16384, n, 4096 // n) for n in sizes]
everything = sparse_ffn.numbers_read(4096, 16384)
drawn, axes = figure(height=2.6)
axes.plot(sizes, np.array(read) / everything, **series("method"), label="with the controller")
axes.plot(sizes, 1 / np.array(sizes), **series("reference"), label="1 / n")
axes.set(xlabel="n, neurons of a block", ylabel="share of a dense layer", xscale="log", yscale="log")
legend(axes)
assert 1.6 < read[-1] / everything * 64 < 1.7
drawn

# %% [markdown]
# Tokens that are decoded together choose each for itself. With even choices, T tokens read 1 - (1 - 1/n)^T of the
# rows, so the gain would be for one reader or a few. What will the favourites of a trained controller change?

# %%
found = sparse.blocks[2].feed_forward
counts, picked = [1, 2, 4, 8, 16, 32], []
with torch.no_grad():
    sparse(lab.validation[:32])
for count in counts:
    groups = torch.nn.functional.one_hot(found.chosen[: 2048 // count * count], 8).unflatten(0, (-1, count))
    picked.append(groups.any(1).double().mean().item())
assert picked[0] == 1 / 8 and (np.diff(picked) > 0).all()

# %% [markdown]
# Tokens share their favourites, and read far less than even and independent choices would (dashed). That is good for
# bytes and bad for the layer: what all tokens choose alike is a small dense layer.

# %%
drawn, axes = figure(height=2.6)
axes.plot(counts, picked, **series("method"), label="measured")
axes.plot(counts, 1 - (1 - 1 / 8) ** np.array(counts), **series("reference"), label="even choices")
axes.set(xlabel="tokens of a decode step", ylabel="share of the rows read", xscale="log", ylim=(0, 1))
legend(axes)
drawn

# %% [markdown]
# ## Is it worth it?
#
# The paper's finding is that one neuron of a block does about as well as all. The honest rival is a dense layer that
# is as small as what is read. After a few steps, from one seed:

# %%
small = small_models.fresh(lab, layers["small dense"][0], 60)
for words, model in (("dense", dense), ("sparse", sparse), ("small dense", small)):
    print(f"{words:12} reads {layers[words][1]:6,} weights of a layer, perplexity {lab.perplexity(model):.0f}")
assert layers["small dense"][1] / layers["sparse"][1] < 1.01

# %% [markdown]
# The recorded claim trains for longer, from three seeds, and holds if the sparse layer beats the small one every time
# and loses at most half as much. Still it is a short training of narrow layers; the paper's are far wider and learn for
# far longer, and a controller has to learn before it can be trusted. What was found, in its own words:

# %%
record = claims.recorded("sparse_ffn")
print(record["sentence"] if record else "not recorded yet: python -m chapters claim sparse_ffn --full")
if record:
    print("reproduced" if record["holds"] else "not reproduced")
assert record is None or record["numbers"]["perplexity, dense"] > 1

# %% [markdown]
# The same as a picture, quality against what is read: the higher, the worse.

# %%
numbers = record["numbers"]
drawn, axes = figure(height=2.6)
for words, role in (("dense", "muted"), ("sparse", "method"), ("small dense", "baseline")):
    read = numbers[f"weights of a layer read, {words}"] / 1e3
    axes.plot(read, numbers[f"perplexity, {words}"], **(series(role) | {"linestyle": "", "markersize": 9}), label=words)
axes.set(xlabel="weights of a layer that a token reads (thousands)", ylabel="perplexity", xlim=(0, None), ymargin=0.2)
legend(axes)
assert numbers["perplexity, dense"] < numbers["perplexity, sparse"]
drawn

# %% [markdown]
# ## The kernel, in bytes
#
# A neuron is a contiguous row of both matrices, so its loads are as wide as in a dense product. Three launches: the
# controller's first matrix; its second one, the argmax on chip, and the chosen rows of `up`; the rows of `down`, of
# which those of a neuron at 0 are skipped. A dense layer would read all of both matrices.

# %%
for case in cases.cases("sparsity.sparse_ffn"):
    sizes = dict(part.split("=") for part in case.name.split() if "=" in part)
    whole = 4 * int(sizes["C"]) * int(sizes["F"])
    print(f"{case.name:52} {case.bytes / 1e6:6.1f} MB, a dense layer {whole / 1e6:7.1f} MB")
    assert case.bytes < whole

# %% [markdown]
# What the compiler makes of it, seen without a GPU (here for an H100 or H200, sm_90):

# %%
report = check.static_report("sparsity.sparse_ffn", [90])
for row in report[:3]:
    print(f"{row['kernel']:16} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the same layer by torch:

# %%
for row in bench.recorded("sparsity.sparse_ffn"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("sparsity.sparse_ffn"):
    print("not recorded yet: python -m kernels bench sparsity.sparse_ffn, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the training mask, the chosen neurons and their sum, and two functions of the
# kernel.
#
# ```
# python -m chapters exercise sparse_ffn --to my
# python -m pytest --submission my tests/sparsity/test_sparse_ffn.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.sparsity
# chapters.sparsity.__path__.insert(0, "../../my/chapters/sparsity")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["sparse_ffn"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["sparse_ffn"])) == 5
