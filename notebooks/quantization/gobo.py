# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # GOBO: eight values for nearly all weights, and a list of exceptions
#
# With 3 bits a weight can be one of eight values. Plain rounding spreads these evenly from the smallest weight to the
# largest. But weights crowd around zero, and a single one far out stretches the grid for all the others.
#
# GOBO draws two conclusions. Keep the few weights far out as they are. And put the eight values where the others are.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.quantization import gobo
from chapters.shared.bit_fields import pack, unpack
from kernels import bench, check, hardware
from kernels.quantization import gobo as kernel
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Here are the weights of one layer, counted on a logarithmic scale, and at the bottom the eight values of plain
# rounding. How many of the eight do most weights have to choose from?

# %%
layers = surgery.linears(lab.model())
weight = layers["blocks.0.attention.q_proj"].weight.detach().numpy().astype(float)
even, _ = gobo.linear_centroids(weight.ravel(), 3)
drawn, axes = figure(height=3.0)
axes.hist(weight.ravel(), bins=120, color=COLOURS["muted"], log=True)
axes.plot(even, np.full(8, 0.6), "s", color=COLOURS["baseline"], markeredgecolor="black", label="plain rounding")
axes.set(xlabel="weight", ylabel="how many", title="eight values, and nearly all weights near three of them")
legend(axes)
drawn

# %% [markdown]
# Count them: how many weights take each value? The outer ones serve a handful.

# %%
taken = np.bincount(gobo.nearest(weight.ravel(), even), minlength=8)
print(taken)
assert np.sort(taken)[-3:].sum() > 0.8 * weight.size

# %% [markdown]
# ## The exceptions
#
# GOBO fits a bell curve to the weights of a layer, by their mean and standard deviation. Where the logarithm of the
# curve is at most −4, the curve expects hardly any weights. Those that are there nevertheless are the outliers. Turn
# the threshold where the notebook is live: a lower one takes fewer exceptions, and leaves a wider range to the others.


# %%
def bell_and_outliers(threshold=-4.0):
    out = gobo.outlier_mask(weight, threshold)
    drawn, axes = figure(height=2.8)
    bins = np.linspace(weight.min(), weight.max(), 121)
    axes.hist(weight[~out], bins, color=COLOURS["muted"], log=True, label="on the bell curve")
    axes.hist(weight[out], bins, color=COLOURS["accent"], log=True, label=f"outliers, {100 * out.mean():.2f}%")
    axes.set(xlabel="weight", ylabel="how many", title=f"outliers: log density at most {threshold:g}")
    legend(axes)
    return drawn


# %% [markdown]
# The outliers stand on both sides, and there are few of them.

# %%
explore(bell_and_outliers, threshold=(-10.0, 0.0, 1.0))

# %% [markdown]
# So it is in all layers, in the order of execution: block by block, attention's four and the feed-forward's three.

# %%
outlier = gobo.outlier_mask(weight)
shares = [100 * gobo.outlier_mask(layer.weight.detach().numpy()).mean() for layer in layers.values()]
drawn, axes = figure(height=2.6)
axes.bar(range(len(shares)), shares, color=COLOURS["method"])
axes.set(xlabel="layer", ylabel="outliers, % of weights", title="few in every layer")
assert outlier.any() and max(shares) < 10
drawn

# %% [markdown]
# There is a trap in it. A density is per unit of weight, so −4 is not a number of standard deviations: it depends on
# the scale. Here is how many standard deviations away from the mean outliers begin, for layers whose weights are spread
# less or more. If all weights of a layer were multiplied by ten, more of them would be outliers, and with larger
# factors all.

# %%
sigma = np.array([0.01, 0.03, 0.1, 0.3, 1, 3, 10, 20])
far = np.sqrt(2 * (4 - np.log(sigma * np.sqrt(2 * np.pi))))
drawn, axes = figure(height=2.5)
axes.bar([f"{each:g}" for each in sigma], far, color=COLOURS["method"])
axes.set(xlabel="standard deviation σ of all weights", ylabel="outliers begin at, σ", title="one threshold, many σ")
assert (np.diff(far) < 0).all()
drawn

# %% [markdown]
# The remedy is to move the threshold by the logarithm of the factor.

# %%
assert gobo.outlier_mask(10 * weight).sum() > outlier.sum() and gobo.outlier_mask(1000 * weight).all()
np.testing.assert_array_equal(gobo.outlier_mask(1024 * weight, -4 - np.log(1024)), outlier)

# %% [markdown]
# ## The values
#
# Sort the other weights, cut them into eight shares of equal size, and begin with the mean of each. Then move: every
# weight goes to its nearest value, every value to the mean of its weights. That is K-means, and it goes on until
# nothing moves. GOBO watches the sum of absolute errors and stops when it falls no further.

# %%
inner = weight[~outlier]
ours, errors = gobo.l1_centroids(inner, 3)
theirs, everything = gobo.kmeans_centroids(inner, 3)
print("absolute error:", ", ".join(f"{error:.1f}" for error in errors))
print(f"K-means goes on for {len(everything) - 1} moves, to {everything[-1]:.1f}")
assert errors == everything[: len(errors)] and min(errors) <= everything[-1]

# %% [markdown]
# K-means reduces the squared error to its end. Past GOBO's stop that means: the outer values move outward, to the few
# weights far out, and the many in the middle pay for it. Which of the two a model prefers is another question; we
# shall measure it.

# %%
drawn, axes = figure(height=2.7)
for level, (role, values, label) in enumerate(
    [("baseline", even, "plain rounding"), ("second", theirs, "K-means"), ("method", ours, "GOBO")]
):
    axes.plot(values, np.full(8, level), **series(role) | {"linestyle": ""}, label=label)
axes.set(xlabel="the eight values", yticks=[], ylim=(-0.6, 2.6), title="without outliers, all eight are of use")
legend(axes, loc="upper left", fontsize=9)
assert ours.max() - ours.min() <= theirs.max() - theirs.min() < even.max() - even.min()
drawn

# %% [markdown]
# ## What is stored
#
# A code of 3 bits for each weight, the eight values, and for each outlier its column and what it exceeds its value by.
# 32 codes fill three words of 32 bits. A nibble has four bits: of four neighbouring columns, three take the lower three
# bits of a nibble in a word of their own, the fourth gives one bit to each. Here is which column each bit of the three
# words holds, the lowest bit first.

# %%
columns = np.zeros((3, 32), int)
for column in range(32):
    words = pack(np.where(np.arange(32) == column, 7, 0)[None], 3)[0, :, 0, 0].view(np.uint32)
    columns += column * (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(int)
drawn, axes = figure(width=9.0, height=1.8)
heatmap(axes, columns, "column", digits=0)
axes.set(xlabel="bit, lowest first", ylabel="word")
drawn

# %% [markdown]
# Nothing is lost on the way, and the bits can be counted.

# %%
held = gobo.gobo(weight, 3)
np.testing.assert_array_equal(unpack(pack(held.codes, 3), *weight.shape), held.codes)
np.testing.assert_array_equal(held.dequantize()[outlier], weight[outlier])
stored = sum(buffer.nbytes for buffer in gobo.CodebookLinear(held).buffers())
assert 8 * stored == round(held.bits_per_weight() * weight.size)
parts = {"codes": 3.0, "starts of rows": 32 * 129 / weight.size, "outliers": 32 * len(held.value) / weight.size}
print("bits per weight:", ", ".join(f"{name} {bits:.2f}" for name, bits in parts.items()))

# %% [markdown]
# The starts of rows are dear here, because rows have 128 columns. With 4096 they take less than 0.01.
#
# ## In the model
#
# The claim quantizes all linear layers of all blocks: as GOBO does, with K-means in its place, with evenly spaced
# values but outliers kept, and by plain rounding. Which of GOBO's two ideas do you expect to bring more?

# %%
claim = gobo.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# At 3 bits keeping outliers is most of the gain: compare plain rounding with evenly spaced values. Better places for
# the values are the rest. And K-means, which the absolute error puts behind GOBO, may well be ahead in perplexity: its
# patience with the tails costs moves, not quality. What speaks for GOBO is the price.

# %%
rise = {rival: claim.numbers[f"rise, {rival} 3 bits"] for rival in gobo.RIVALS}
assert claim.holds and rise["GOBO"] < rise["even centroids"] < rise["plain rounding"]
assert claim.numbers["moves, GOBO"] < 0.5 * claim.numbers["moves, K-means"]

# %% [markdown]
# ## The kernel, in bytes
#
# For one token a product waits for its weights, and at 3 bits these are less than a fifth of the bytes. Whether a
# kernel gets so far is a matter of instructions: each weight needs a shift, an AND, a lookup and a multiply-add. The
# table lies in shared memory, where one lookup takes as long as four other instructions.

# %%
gpu, case = hardware.GPUS["H200"], kernel.llama_case(1, 4096, 4096)
least = {"bfloat16": 2 * (4096 * 4096 + 8192) / gpu.bandwidth, "3 bits, outliers": hardware.floor_seconds(case, gpu)}
drawn, axes = figure(height=1.9)
axes.barh(list(least), [1e6 * seconds for seconds in least.values()], color=COLOURS["method"])
axes.set(xlabel="least time on an H200, µs (one token, 4096 × 4096)")
axes.invert_yaxis()
assert 4.5 < least["bfloat16"] / least["3 bits, outliers"] < 16 / 3
drawn

# %% [markdown]
# What the compiler makes of it for an H100 or H200 (sm_90), seen without one: no spilled registers, loads of 128 bits
# for one token, tensor cores for more.

# %%
report = check.static_report("quantization.gobo", [90])
for row in report:
    print(f"{row['case']:26} {row['kernel']:13} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside cuBLAS on the dense weight:

# %%
for row in bench.recorded("quantization.gobo"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.gobo"):
    print("not recorded yet: python -m kernels bench quantization.gobo, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: finding outliers, finding the values, the product, and its kernel for one token.
#
# ```
# python -m chapters exercise gobo --to my
# python -m pytest --submission my tests/quantization/test_gobo.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["gobo"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["gobo"])) == 4
