# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Mixed precision: bits where the loss curves
#
# Equal bits for every layer treat all layers as equally important. They are not: one layer can be rounded to four
# values without anybody noticing, another cannot. This notebook measures which is which, by second derivatives of the
# loss, and spends a fixed number of bits accordingly. (Rounding to b bits gives a weight 2^b values to choose from: see
# `uniform`.)

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import mixed_precision as mp
from chapters.quantization.weight_only import nearest_codes
from kernels import bench, check
from kernels.quantization import mixed_precision as kernel
from minitfm import evaluate, surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
model, text = lab.model(), lab.calibration(count=4, length=64)
sizes = np.array([layer.weight.numel() for layer in surgery.linears(model).values()])

# %% [markdown]
# ## What hurts
#
# Round one layer at a time to 2 bits, and leave all others as they are. By how much does the perplexity rise?

# %%
rises = []
for name in surgery.linears(model):
    rounded = lab.model()
    weight = surgery.linears(rounded)[name].weight
    weight.data = torch.from_numpy(nearest_codes(weight.numpy(force=True), mp.GROUP, 2).dequantize()).float()
    rises.append(evaluate.perplexity(rounded, lab.validation[::4]))
rises = np.array(rises) - evaluate.perplexity(model, lab.validation[::4])
assert rises.max() > 10 * np.quantile(rises, 0.2)

# %% [markdown]
# Here are all layers, in order of execution: a row for each block, attention's four layers and the feed-forward's
# three. Rounding some costs nothing, rounding others a lot.

# %%
drawn, axes = figure(height=2.8)
heatmap(axes, np.maximum(rises, 0).reshape(lab.config.layers, -1), "rise of perplexity", digits=1)
kinds = [name.rpartition(".")[2].removesuffix("_proj") for name in surgery.linears(model)]
axes.set(xticks=range(7), xticklabels=kinds[:7], ylabel="block", title="one layer at a time in 2 bits")
drawn

# %% [markdown]
# ## The idea
#
# Where training ends, the gradient is nearly 0, so a small change e of a layer's weights changes the loss by its second
# derivatives, the Hessian H: by ½ eᵀ H e. If e points nowhere in particular, that is about ½ · mean eigenvalue of H ·
# ‖e‖². The mean eigenvalue is H's trace, the sum of its diagonal, divided by the number of weights. Which is the better
# forecast: the error ‖e‖² alone, or times the curvature? Below, each dot is a layer.

# %%
errors, sensitivity = mp.rounding_errors(model, mp.CHOICES, mp.GROUP), mp.layer_sensitivity(model, text, "trace")
drawn, axes = panels(2, width=8.4, height=3.0, sharey=True)
for axis, cost in zip(axes, (errors[:, 0], sensitivity * errors[:, 0]), strict=True):
    axis.scatter(cost, np.maximum(rises, 1e-3), color=COLOURS["method"])
axes[0].set(xlabel="‖e‖²", ylabel="rise of perplexity", yscale="log", title="the error alone tells little")
axes[1].set(xlabel="mean eigenvalue · ‖e‖²", xscale="log", title="times the curvature, much")
ranks = [np.argsort(np.argsort(each)) for each in (errors[:, 0], sensitivity * errors[:, 0], rises)]
assert np.corrcoef(ranks[1], ranks[2])[0, 1] > 0.6 > np.corrcoef(ranks[0], ranks[2])[0, 1]
drawn

# %% [markdown]
# ## A trace without a matrix
#
# A layer of 16,384 weights has a Hessian of 268 million numbers. It is never formed. `hessian_products` gives for each
# layer a function v → H v, one backward pass through the gradient. And for random signs v, vᵀ H v is the trace on
# average: on the diagonal signs meet themselves, elsewhere they cancel. `hutchinson` averages over such probes.

# %%
products = mp.hessian_products(model, text)
name = "blocks.2.attention.v_proj"
estimates = mp.hutchinson(products[name], surgery.linears(model)[name].weight.numel(), 48)
running = np.cumsum(estimates) / np.arange(1, 49)
drawn, axes = figure(height=2.4)
axes.plot(np.arange(1, 49), running, **series("method") | {"marker": ""})
axes.axhline(running[-1], **series("reference"))
axes.set(xlabel="probes so far", ylabel="trace, estimated", ylim=(0, None), title="a few probes are enough")
assert abs(running[3] / running[-1] - 1) < 0.5
drawn

# %% [markdown]
# Four probes are enough to rank layers whose mean eigenvalues differ by orders of magnitude.

# %%
del products  # and with them the graph
assert sensitivity.max() > 10 * np.quantile(sensitivity, 0.2)

# %% [markdown]
# ## A trap on the way
#
# Q-BERT takes the top eigenvalue λ₁ instead of the trace. Power iteration finds it: multiply a random v by H again and
# again, and the direction of the largest eigenvalue takes over. But when to stop? The released code stops when the
# estimate hardly changes. Where the second is nearly as large with the other sign, λ₂ ≈ −λ₁, the estimate rests for
# long somewhere between the two. `power_iteration` asks whether H v points along v, which is true at eigenvectors only.
# We try both on a matrix whose eigenvalues we have chosen, 1 and −0.995 at the top.

# %%
rng = np.random.default_rng(0)
basis = np.linalg.qr(rng.standard_normal((60, 60)))[0]
matrix = basis * np.r_[1, -0.995, rng.uniform(-0.5, 0.5, 58)] @ basis.T
starts = rng.standard_normal((20, 60))
released = [mp.released_eigenvalue(lambda v: matrix @ v, start) for start in starts]
ours = [mp.power_iteration(lambda v: matrix @ v, start)[0] for start in starts]

# %% [markdown]
# One rule is fooled by the plateau from most starts, the other by none.

# %%
drawn, axes = figure(height=2.8)
axes.scatter(np.arange(20), released, color=COLOURS["baseline"], marker="s", label="stops when it rests")
axes.scatter(np.arange(20), ours, color=COLOURS["method"], label="stops at an eigenvector")
axes.set(xlabel="random start", ylabel="eigenvalue found", xticks=range(0, 20, 4), ylim=(-1.2, 1.9))
legend(axes, ncols=2, loc="upper center")
assert np.allclose(ours, 1, atol=1e-3) and np.mean(np.abs(np.array(released) - 1) > 0.1) > 0.5
drawn

# %% [markdown]
# ## Spending bits
#
# What 2, 3, 4 or 8 bits cost a layer is its curvature times its error at that width. `assign_bits` finds the cheapest
# choice within a budget, exactly: layer after layer it keeps the partial choices that no other undercuts in both size
# and cost. Turn the budget where the notebook is live: who gets the next bit?


# %%
def bits_for(mean=3.0):
    budget = int(mean * sizes.sum())
    bits = mp.assign_bits(sensitivity[:, None] * errors, sizes.tolist(), mp.CHOICES, budget)
    assert bits @ sizes <= budget
    drawn, axes = figure(height=2.8)
    heatmap(axes, bits.reshape(lab.config.layers, -1), "bits", limit=8, digits=0)
    axes.set(xticks=range(7), xticklabels=kinds[:7], ylabel="block", title=f"{mean:g} bits for a weight, on average")
    return drawn


# %% [markdown]
# Compare it with the first picture: the layers that cost most in 2 bits get more of them.

# %%
explore(bits_for, mean=(2.0, 6.0, 0.25))

# %% [markdown]
# ## In the model
#
# At equal size, the claim compares these bits with equal bits, with the same traces dealt to the layers at random, and
# in reversed order. If traces dealt at random did as well, curvature would not be what helps; do they? On the right,
# activations: two outlier channels are planted, a grid of 8 bits per tensor then breaks the model, and the tensors that
# hurt most one by one are held in 16 bits.

# %%
claim = mp.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Traces dealt at random are worse than equal bits, so it matters who gets them: a layer in 2 bits that needs more is
# dearer than all that the others save. How many activations need 16 bits depends on where outliers stand. Planted ones
# stand behind every norm, so that a quarter or so of the activations is needed here.

# %%
assert claim.holds
assert claim.numbers["perplexity, 3.0 bits, dealt at random"] > claim.numbers["perplexity, 3 bits everywhere"]

# %% [markdown]
# ## The kernel, in bytes
#
# Layers of 2, 3, 4 and 8 bits lie in one buffer, and one launch expands them all: each program looks up its layer in a
# table and takes the branch of its width. Below, the bytes of one block of Llama-8B, beside expanding it by steps that
# write each weight as a byte, read it, and write and read it in float32.

# %%
case = kernel.CASES[0]
weights = 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3)
drawn, axes = figure(height=2.2)
axes.barh("in steps", (case.bytes + 10 * weights) / 1e6, color=COLOURS["baseline"])
axes.barh("fused", case.bytes / 1e6, color=COLOURS["method"])
axes.set(xlabel="megabytes moved for one block", title="expanded in one launch")
drawn

# %% [markdown]
# What the compiler makes of it for an H100 or H200 (sm_90): no spilled registers, no shared memory, loads and stores
# of 128 bits whatever the width.

# %%
report = check.static_report("quantization.mixed_precision", [90])
for row in report:
    print(f"{row['case']:36} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside what torch offers for the same job:

# %%
for row in bench.recorded("quantization.mixed_precision"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.mixed_precision"):
    print("not recorded yet: python -m kernels bench quantization.mixed_precision, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Power iteration, the trace, Q-BERT's sensitivity, the assignment, and two functions of the kernel are left to you.
#
# ```
# python -m chapters exercise mixed_precision --to my
# python -m pytest --submission my tests/quantization/test_mixed_precision.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["mixed_precision"]):
    print(f"{exercise.points} points  {exercise.function}")
