# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Transposable masks: sparse on the way back, too
#
# A 2:4 weight keeps two of every four neighbours in a row, and hardware skips the rest. That serves the forward
# product, which runs along rows. Training has a second product: the gradient of the input runs along columns. What
# does a 2:4 mask look like from there? And what does it cost to make it 2:4 in both directions?
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.figures import COLOURS, figure, legend, panels, series
from chapters.lab import Lab
from chapters.shared.pruned_layers import prune_each, train_masked
from chapters.sparsity import n_m, transposable
from kernels import bench, cases, check, hardware
from minitfm import train

lab = Lab()
weight = lab.weights["blocks.1.feed_forward.up_proj.weight"].double().numpy()

# %% [markdown]
# ## What hurts
#
# Prune a layer to 2:4 along its rows, then count how many weights stay in every four neighbours of a column. Nobody
# asked that there be two. Groups with three or four cannot be stored as 2:4, so the transpose of this weight is a
# dense matrix with some zeros.

# %%
rows_only = n_m.n_m_mask(weight)
of_columns = rows_only.T.reshape(-1, 4).sum(axis=1)
counts = np.bincount(of_columns, minlength=5) / of_columns.size
assert transposable.obeys(rows_only, 2, 4) and not transposable.obeys(rows_only.T, 2, 4)
assert counts[3:].sum() > 0.2
drawn, axes = figure(height=2.4)
axes.bar(range(5), 100 * counts, color=[COLOURS["method"]] * 3 + [COLOURS["baseline"]] * 2)
axes.set(xlabel="weights that stay of four neighbours in a column", ylabel="groups (%)")
axes.set_title(f"{counts[3:].sum():.0%} of the groups hold more than two")
drawn

# %% [markdown]
# The obvious repair is to keep what both directions would keep: prune along rows, prune along columns, and take what
# survives both. It is 2:4 both ways. But how much will be left? Far less than half, for the two choices know nothing of
# each other.

# %%
both = rows_only & n_m.n_m_mask(weight.T).T
assert transposable.obeys(both, 2, 4) and transposable.obeys(both.T, 2, 4)
print(f"{both.mean():.0%} of the weights stay")
assert both.mean() < 0.4

# %% [markdown]
# ## Choose for a block
#
# Take 4 × 4 weights at once and ask for two in every row and every column. How many such masks are there? Rows alone
# leave 6 choices each, 6⁴ in a block. Columns leave 90 of these. Here are the first sixteen, black where a weight
# stays.

# %%
patterns = transposable.transposable_patterns(2, 4)
assert len(patterns) == transposable.mask_diversity(2, 4) == 90
drawn, axes = panels(16, width=9.6, height=0.9)
for place, pattern in zip(axes, patterns, strict=False):
    place.imshow(pattern, cmap="Greys", interpolation="nearest")
    place.set(xticks=[], yticks=[])
drawn

# %% [markdown]
# Ninety is few enough to try them all. A block's magnitudes, written as a row of 16 numbers, times a table of the 90
# masks, gives 90 sums; the largest wins. Of equal sums the first mask wins, so that the result is defined.

# %%
block = np.array([[3, 7, 5, 8], [9, 9, 7, 4], [9, 6, 7, 8], [9, 4, 1, 8]])
sums = np.abs(block).reshape(1, 16) @ patterns.reshape(90, 16).T
best = transposable.best_mask(block, patterns)
print(best.astype(int), sums.max())
np.testing.assert_array_equal(best, patterns[sums.argmax()])
assert block[best].sum() == sums.max()

# %% [markdown]
# Here is what the three ways keep in a corner of the layer, and how much of its magnitude that is. On the left, look
# down a column: many neighbours, then none. In the middle what both directions would keep, with holes. On the right the
# best masks of all blocks: two in each row and two in each column of a block.

# %%
chosen = {"rows only": rows_only, "in both": both, "best of 90": transposable.best_mask(weight, patterns)}
drawn, axes = panels(3, width=8.0, height=3.0)
for place, (words, mask) in zip(axes, chosen.items(), strict=True):
    place.imshow(mask[:24, :24], cmap="Greys", interpolation="nearest")
    share = np.abs(weight[mask]).sum() / np.abs(weight).sum()
    place.set(title=f"{words}: {share:.0%}", xlabel="input", ylabel="output")
    place.set(xticks=np.arange(0, 24, 4) - 0.5, yticks=np.arange(0, 24, 4) - 0.5, xticklabels=[], yticklabels=[])
assert chosen["best of 90"].mean() == 0.5
drawn

# %% [markdown]
# ## Larger blocks
#
# For 8 × 8 there are more than 10¹¹ masks. A linear program finds the best one exactly, but slowly. Greedy is simple:
# take the heaviest weight whose row and column still have room, until there is none. It keeps at least half of what the
# best mask keeps, by proof, and nearly all in practice. The toy block above shows how it can fail: it ends with a row
# and a column that lack one each, and the weight where they meet is taken already.

# %%
greedy = transposable.greedy_mask(block, 2, 4)
print(greedy.astype(int))
assert greedy.sum() == 7 and block[greedy].sum() < block[best].sum()
masks = transposable.greedy_mask(weight, 2, 4), transposable.best_mask(weight, patterns)
shares = [np.abs(weight[mask]).sum() for mask in masks]
assert 0.97 < shares[0] / shares[1] < 1

# %% [markdown]
# ## What stays
#
# How much of the layer's magnitude is left when half of its weights are? Longer groups leave more, for rows and both
# ways alike, and the two curves come together: in a long group, a row and a column rarely want different things.

# %%
sizes = [(1, 2), (2, 4), (4, 8), (8, 16)]
ways = {"rows only": n_m.n_m_mask, "rows and columns": transposable.transposable_mask}
total = np.abs(weight).sum()
left = {name: [np.abs(weight[rule(weight, *size)]).sum() / total for size in sizes] for name, rule in ways.items()}
drawn, axes = figure(height=2.8)
for (name, values), role in zip(left.items(), ("baseline", "method"), strict=True):
    axes.plot([f"{n}:{m}" for n, m in sizes], 100 * np.array(values), **series(role), label=name)
axes.set(xlabel="pattern", ylabel="magnitude that stays (%)", title="in long groups both directions cost little")
legend(axes)
drawn

# %% [markdown]
# In numbers: what the second direction takes away, for each length of a group.

# %%
lost = np.array(left["rows only"]) - np.array(left["rows and columns"])
print([f"{share:.1%}" for share in lost])
assert (np.diff(lost) < 0).all() and (lost > 0).all()

# %% [markdown]
# ## The way back
#
# This is what it was for. If g is the gradient of the layer's output, that of its input is g W, and as Wᵀ is 2:4, it
# comes from the compressed Wᵀ by half of the products. A weight that is 2:4 in rows only is refused: there is no such
# form of it.

# %%
sparse = np.where(transposable.transposable_mask(weight), weight, 0)
gradient = np.random.default_rng(0).normal(size=(3, len(weight)))
np.testing.assert_allclose(transposable.input_gradient(gradient, sparse), gradient @ sparse, atol=1e-12)
try:
    transposable.input_gradient(gradient, np.where(rows_only, weight, 0))
except ValueError as error:
    print(error)

# %% [markdown]
# `TransposableLinear` holds both forms, and autograd calls each in its turn. Together they are 9/8 of the dense weight
# in 16 bits: no memory is saved, but each pass reads only 9/16.

# %%
linear = torch.nn.Linear(128, 384, bias=False).half()
linear.weight.data = torch.from_numpy(sparse).half()
layer, x = transposable.TransposableLinear(linear), torch.randn(2, 128, dtype=torch.float16, requires_grad=True)
(found,) = torch.autograd.grad(layer(x).sum(), x)
torch.testing.assert_close(found, linear.weight.sum(0).expand(2, -1), rtol=1e-2, atol=1e-2)
held = [sum(buffer.nbytes for buffer in part.buffers()) / linear.weight.nbytes for part in (layer.forth, layer.back)]
assert held == [9 / 16, 9 / 16]

# %% [markdown]
# ## What it costs the model
#
# All linear layers of all blocks, one shot, no training: perplexity on text that the model has never seen. 2:4 both
# ways drops the same half as 2:4. What will it cost?

# %%
found = {name: n_m.perplexities(lab, rule)[0] for name, rule in transposable.rules().items()}
drawn, axes = figure(height=2.8)
axes.barh(list(found), list(found.values()), color=[COLOURS["baseline"]] * 3 + [COLOURS["method"]] * 3)
axes.axvline(lab.base_perplexity, color=COLOURS["reference"], linestyle="--")
axes.set(xlabel="perplexity (dashed: dense)", xscale="log", title="the second direction is dear in short groups")
axes.invert_yaxis()
drawn

# %% [markdown]
# Every pattern pays for the second direction, the shortest groups the most. 4:8 both ways is far better than 2:4 both
# ways, and in the neighbourhood of plain 2:4, as Hubara et al. found. Hardware that knows 2:4 only gains nothing from
# that; it is an argument for hardware that knows 4:8.

# %%
for pattern in ("1:2", "2:4", "4:8"):
    assert lab.base_perplexity < found[pattern] < found[f"{pattern} both ways"]
assert 0.7 < found["4:8 both ways"] / found["2:4"] < 1.5

# %% [markdown]
# ## Trained on
#
# One shot is the worst case; these masks are made for training. So train on with the mask in place, for 20 steps and
# then for 60 more.

# %%
curves = {}
for name in ("2:4", "2:4 both ways"):
    model, costs = lab.model(), []
    masks = prune_each(model, transposable.rules()[name])
    for steps in (0, 20, 60):
        settings = train.Settings(max(steps, 1), 8, 64, "adamw", learning_rate=1e-3, weight_decay=0.0, seed=0)
        if steps:
            train_masked(model, masks, lab.train_stream, settings)
        costs.append(lab.perplexity(model))
    curves[name] = costs

# %% [markdown]
# A few steps win most of it back, and the gap between the two kinds of masks narrows. (The dense model was not trained
# on these steps; given them, it would be better, too.)

# %%
drawn, axes = figure(height=2.6)
for (name, costs), role in zip(curves.items(), ("baseline", "method"), strict=True):
    axes.plot([0, 20, 80], costs, **series(role), label=name)
axes.axhline(lab.base_perplexity, color=COLOURS["reference"], linestyle="--", label="dense, not trained on")
axes.set(xlabel="training steps", ylabel="perplexity", yscale="log", title="training closes the gap")
legend(axes)
gaps = [both - rows for rows, both in zip(*curves.values(), strict=True)]
assert 0 < gaps[2] < gaps[0] / 4
drawn

# %% [markdown]
# ## The kernel, in bytes
#
# The kernel tries all 90 masks on chip: one product of blocks and table on the tensor cores, then the choice. It reads
# the weight once and writes the mask once. Plain torch writes 90 float32 scores for every 16 weights in between.

# %%
case = cases.cases("sparsity.transposable")[0]
numbers = 4096 * 4096
scores = 2 * 90 * 4 * numbers / 16
for name, size in (("kernel", case.bytes), ("scores alone, written and read", scores)):
    print(f"{name}: {size / 1e6:.0f} MB, at least {1e6 * size / hardware.GPUS['H200'].bandwidth:.0f} µs on an H200")
assert case.bytes < 3.01 * numbers and scores == 45 * numbers

# %% [markdown]
# The machine code for an H100 or H200 (sm_90), made without one: nothing spilled, loads of 128 bits, and the tensor
# cores at work (HGMMA is their instruction).

# %%
report = check.static_report("sparsity.transposable", [90])
for row in report:
    print(f"{row['case']:28} {row['kernel']:12} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And, where recorded, its time on a GPU.

# %%
for row in bench.recorded("sparsity.transposable"):
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs")
if not bench.recorded("sparsity.transposable"):
    print("not recorded yet: python -m kernels bench sparsity.transposable, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: four functions of the reference, and one of the kernel.
#
# ```
# python -m chapters exercise transposable --to my
# python -m pytest --submission my tests/sparsity/test_transposable.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["transposable"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["transposable"])) == 5
