# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # GPTQ: rounding errors that repair each other
#
# To write one token, a language model reads all of its weights and does two operations with each. What it waits for
# is memory: weights of 4 bits instead of 16 are read four times as fast. A code of b bits can name 2^b values, so
# every weight must move to one of a few points of a grid. This notebook is about where to move it.
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, panels, series
from chapters.lab import Lab
from chapters.quantization import gptq, weight_only
from kernels import bench, cases, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# The obvious rule is to round each weight to the nearest grid point. Here are all linear layers of all blocks, with
# one grid for each row of each matrix. At 4 bits the model hardly notices; at 2 bits it has lost its mind.

# %%
widths, nearest = (8, 4, 3, 2), []
for bits in widths:
    model = lab.model()
    gptq.round_model(model, bits)
    nearest.append(lab.perplexity(model))
drawn, axes = figure(height=2.6)
axes.barh([f"{bits} bits" for bits in widths], nearest, color=COLOURS["baseline"])
axes.axvline(lab.base_perplexity, **series("reference"))
axes.set(xlabel="perplexity (dashed: full precision)", title="each weight rounded to the nearest")
drawn

# %% [markdown]
# A bit less means half as many points to choose from, and errors twice as large. As ranges, so that another
# training run may confirm them:

# %%
assert nearest[0] < 1.02 * lab.base_perplexity and nearest == sorted(nearest) and nearest[-1] > 1.5 * nearest[0]

# %% [markdown]
# ## The grid
#
# `find_grid` gives each row a scale, the distance of its grid points, and a zero point, the code that means 0. The
# range always holds 0, so that a weight of 0 stays 0. `quantize` turns weights into codes, `dequantize` back into
# numbers. Here is one row of a layer at 3 bits: dots on the diagonal would have kept their value. Turn the bits where
# the notebook is live.

# %%
weight = lab.weights["blocks.1.feed_forward.up_proj.weight"].numpy().astype(float)


def rounded_row(bits=3):
    scale, zero = gptq.find_grid(weight[:1], bits)
    codes = gptq.quantize(weight[:1], scale, zero, bits)
    drawn, axes = figure(width=5.0, height=2.8)
    axes.plot(weight[0], weight[0], color=COLOURS["reference"], linewidth=1)
    axes.scatter(weight[0], weight_only.dequantize(codes, scale, zero)[0], s=8, color=COLOURS["baseline"])
    axes.set(xlabel="weight", ylabel="rounded", title=f"{len(np.unique(codes))} values for {codes.size} weights")
    return drawn


# %% [markdown]
# Each horizontal run of dots is one code: all of its weights become one number.

# %%
explore(rounded_row, bits=(2, 6))

# %% [markdown]
# A weight inside the range moves by half a step at most. (An end of the range may move a little further, because
# the zero point itself is rounded.) Taken alone, no weight could do better.

# %%
scale, zero = gptq.find_grid(weight[:1], 3)
codes = gptq.quantize(weight[:1], scale, zero, 3)
rounded = weight_only.dequantize(codes, scale, zero)
assert np.mean(np.abs(rounded - weight[:1]) <= scale / 2 * (1 + 1e-9)) > 0.95
assert codes.max() <= 7 and gptq.quantize(np.zeros(1), scale, zero, 3)[0] == zero[0]

# %% [markdown]
# ## The idea
#
# But weights are not taken alone. A layer computes sums of weights times inputs, and inputs are correlated: where input
# 5 is large, input 9 tends to be large as well. If the weight of input 5 was rounded up, the weight of input 9 can give
# way a little, and the sum stays where it was. What counts is the error of the *outputs*, and it depends on the inputs
# only through the Hessian H = 2 XᵀX, where X has a row for each token of some calibration text and a column for each
# input: a row of weights that errs by e loses ½ eᵀHe. What stands off its diagonal says which weights can help each
# other out. Here it is for the first 32 inputs of the layer, scaled to correlations (and 0 on the diagonal).

# %%
name = "blocks.1.feed_forward.up_proj"
hessian = lab.once("hessian", lambda: gptq.hessians(lab.model(), lab.calibration(count=64), [name])[name])
spread = np.sqrt(np.diag(hessian))
correlation = hessian / np.outer(spread, spread)
drawn, axes = figure(width=5.0, height=3.4)
heatmap(axes, correlation[:32, :32] - np.eye(32), "correlation")
axes.set(xlabel="input", ylabel="input", title="inputs that move together")
drawn

# %% [markdown]
# Some pairs of inputs are clearly correlated: one can stand in for the other.

# %%
others = np.abs(correlation - np.eye(len(correlation)))
assert others.max() > 0.3

# %% [markdown]
# ## One column at a time
#
# GPTQ rounds the first column, computes the error that this makes, and changes all columns not yet rounded so that
# they make up for it as well as they can. Then the second column, and so on. How much column j has to change for an
# error in column i is written in row i of U, a triangular factor of the inverse Hessian that `inverse_factor`
# computes once.
#
# These few lines are the whole method, for one grid per row. We keep a copy of the weights after each step.

# %%
columns = 24
h = hessian[:columns, :columns]
upper, rest, history = gptq.inverse_factor(h, damping=0.01), weight[:, :columns].copy(), []
scale, zero = gptq.find_grid(rest, 3)
for i in range(columns):
    rounded = weight_only.dequantize(gptq.quantize(rest[:, i], scale, zero, 3), scale, zero)
    rest[:, i:] -= np.outer((rest[:, i] - rounded) / upper[i, i], upper[i, i:])
    history.append(rest[0] - weight[0, :columns])
np.testing.assert_allclose(rest, gptq.gptq(weight[:, :columns], h, 3).dequantize(), atol=1e-12)

# %% [markdown]
# What you see below is one row of the matrix, 24 weights wide, from top to bottom after each of 24 steps: how far
# each weight stands from where it was. To the left of the diagonal, columns are rounded and stay as they are. To
# the right they drift, step by step, to make up for all errors so far, until their own turn comes.

# %%
moved = np.array(history)
drawn, axes = figure(height=3.4)
heatmap(axes, moved, "distance from the trained weight")
axes.set(xlabel="column", ylabel="columns rounded so far", title="what is not yet rounded makes up")
assert (moved[-1] == moved[np.arange(columns), np.arange(columns)]).all(), "a rounded column never moves again"
assert np.abs(np.triu(moved, 1)).max() > 0, "the others do"
drawn

# %% [markdown]
# ## Worse weights, better outputs
#
# Back to the whole layer at 3 bits. On the left what round to nearest (RTN) changes in a corner of the matrix, in the
# middle what GPTQ changes. By the look of it GPTQ is worse: its weights are further from the trained ones. On the
# right is what that does to the outputs, the quantity that we care about. What do you expect there?

# %%
layers = {"RTN": gptq.round_to_nearest(weight, 3), "GPTQ": gptq.gptq(weight, hessian, 3)}
errors = {method: held.dequantize() - weight for method, held in layers.items()}
outputs = {method: np.sum(error @ hessian * error) for method, error in errors.items()}
drawn, axes = panels(3, width=9.6, height=2.8)
for place, (method, error) in zip(axes, errors.items(), strict=False):
    heatmap(place, error[:24, :24], "weight error", limit=float(np.abs(errors["GPTQ"]).max()) / 2)
    place.set(title=f"{method}: what changed", xlabel="input", ylabel="output")
axes[2].bar(list(outputs), [1, outputs["GPTQ"] / outputs["RTN"]], color=[COLOURS["baseline"], COLOURS["method"]])
axes[2].set(title="and to the outputs", ylabel="error, RTN = 1")
drawn

# %% [markdown]
# The weights' own error has grown, that of the outputs has shrunk.

# %%
assert np.sum(errors["GPTQ"] ** 2) > np.sum(errors["RTN"] ** 2)
assert outputs["GPTQ"] < 0.95 * outputs["RTN"]

# %% [markdown]
# ## Where it comes from
#
# GPTQ's ancestor OBQ chooses which weight of a row to round next: the one that costs least. Every row then has an
# order, and an inverse Hessian, of its own, which is why OBQ is slow. The order was thought to be worth it. GPTQ's
# finding is that a common order does nearly as well. Here are a few rows of an attention layer at 3 bits, on all three.

# %%
query = lab.weights["blocks.1.attention.q_proj.weight"].numpy().astype(float)[:16]
name = "blocks.1.attention.q_proj"
h = lab.once("hessian of q", lambda: gptq.hessians(lab.model(), lab.calibration(count=64), [name])[name])
found = {"RTN": gptq.round_to_nearest(query, 3), "GPTQ": gptq.gptq(query, h, 3)}
found["OBQ"] = gptq.obq(query, h, 3, damping=0.01)
errors = {method: held.dequantize() - query for method, held in found.items()}
losses = {method: np.sum(error @ h * error) for method, error in errors.items()}

# %% [markdown]
# Both lose less than rounding to nearest; OBQ takes the columns of every row in an order of its own.

# %%
drawn, axes = figure(height=1.9)
axes.barh(list(losses), [loss / losses["RTN"] for loss in losses.values()], color=COLOURS["method"])
axes.set(xlabel="output error, round to nearest = 1")
assert max(losses["GPTQ"], losses["OBQ"]) < losses["RTN"]
drawn

# %% [markdown]
# ## The options
#
# Groups of 32 columns with a grid of their own fit better, and cost a scale and a zero point each. `act_order`
# takes the columns with the largest inputs first, while there are still many others to repair the damage. `mse`
# shrinks the range of a grid where that lowers the error of the weights. That helps when few of them stick out, but
# hurts when just those meet the large inputs.

# %%
chosen = {"GPTQ": {}, "mse": {"mse": True}, "act-order": {"act_order": True}, "groups of 32": {"group_size": 32}}
chosen["groups of 32, act-order"] = {"group_size": 32, "act_order": True}
held = {"RTN": layers["RTN"]} | {label: gptq.gptq(weight, hessian, 3, **options) for label, options in chosen.items()}
errors = {label: found.dequantize() - weight for label, found in held.items()}
losses = [np.sum(error @ hessian * error) / outputs["RTN"] for error in errors.values()]
drawn, axes = figure(height=2.4)
axes.barh([f"{label}, {found.bits_per_weight():.2f} bits" for label, found in held.items()], losses)
axes.set(xlabel="output error, RTN = 1")
axes.invert_yaxis()
drawn

# %% [markdown]
# Groups and act-order improve on plain GPTQ for this layer, and plain GPTQ on rounding to nearest.

# %%
assert losses[0] > losses[1] > max(losses[3:])

# %% [markdown]
# ## What it does to the model
#
# All layers of all blocks now, one block after another, each calibrated on what comes through the quantized blocks
# before it. This is the chapter's claim: at 3 bits GPTQ loses less than rounding to nearest. It is measured here on
# text that neither training nor calibration has seen. At which width do you expect the difference to be largest?

# %%
claim = gptq.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# The finer the grid, the less there is to repair: at 4 bits both methods are close to full precision. At 2 bits the
# difference is largest, and groups are worth their price. What the figure cannot say is how a larger model fares; it
# has more columns to repair with, and usually loses less.

# %%
assert claim.holds
for grid in ("per row", "in groups of 32"):
    assert claim.numbers[f"rise, GPTQ 2 bits {grid}"] < claim.numbers[f"rise, RTN 2 bits {grid}"]

# %% [markdown]
# ## Packed
#
# Codes of 4 bits are of use only if they are stored in 4 bits: eight in an int32, as the chapter `weight_only` tells.
# `WeightOnlyLinear` holds packed codes and grids, nothing else. It takes the place of a linear layer; on a GPU it
# calls the kernel, here it unpacks for each call and computes what the rounded weights compute.

# %%
model = lab.model()
done = gptq.quantize_model(model, lab.calibration(count=16), 4, group_size=32)
with torch.no_grad():
    expected = model(lab.validation[:2])
    weight_only.use_packed(model, done)
    moved = (model(lab.validation[:2]) - expected).abs().max() / expected.abs().max()
assert moved < 1e-5  # float32's rounding, relative to the largest logit

# %% [markdown]
# ## The kernel, in bytes
#
# What takes the time in GPTQ itself is the loop over columns: ten small operations for each, and after each the rest
# of the block is read and written. The kernel keeps a block of 128 columns of a few rows on chip for all 128 steps,
# reads it once and writes codes and errors once. (How the packed codes are multiplied is told in `weight_only`.)

# %%
case = cases.cases("quantization.gptq")[0]
again = 2 * 4 * 4096 * sum(range(128))  # float32 read and written: what is left of the block, after each column
for label, size in (("column by column", again), ("kernel", case.bytes)):
    print(f"{label}: {size / 1e6:.1f} MB, at least {1e6 * size / hardware.GPUS['H200'].bandwidth:.1f} µs on an H200")
assert again > 20 * case.bytes

# %% [markdown]
# Timed on a GPU, beside the same loop in torch:

# %%
for row in bench.recorded("quantization.gptq"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.gptq"):
    print("not recorded yet: python -m kernels bench quantization.gptq, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the functions of the reference, its ancestor, and the column solver.
#
# ```
# python -m chapters exercise gptq --to my
# python -m pytest --submission my tests/quantization/test_gptq*.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["gptq"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["gptq"])) == 6
