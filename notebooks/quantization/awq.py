# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # AWQ: scale up what matters, then round
#
# Rounding weights to 3 or 4 bits moves each of them a little. What that does to a layer's output depends on the
# inputs: an error in a weight is multiplied by the input that it meets. In large language models a few input channels
# are many times larger than the others, so a few columns of every weight matrix deserve more care than the rest. AWQ
# gives it to them without storing anything extra.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import awq, weight_only
from kernels import bench, cases, hardware
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## Outliers, planted
#
# A small model does not grow such channels by itself. So we plant them: 13 channels of every norm's gain become 5 times
# as large, and the matching columns of the weights that read them 5 times as small. The model computes what it did
# before. Here is what one layer then reads: on the left 48 tokens, one a row, on the right the mean of each channel
# over all tokens of a calibration text.

# %%
planted, name = awq.model_of(lab, True, seed=0), "blocks.1.feed_forward.up_proj"
recorded = surgery.record_inputs(planted, lab.calibration(count=8), [name])
x = torch.cat([x for _, x in recorded]).flatten(0, 1).numpy().astype(float)  # [tokens, in]
magnitude = np.abs(x).mean(axis=0)
drawn, axes = panels(2, width=9.0, height=2.6)
heatmap(axes[0], np.abs(x[:48]), "|x|", limit=float(3 * magnitude.max()))
axes[0].set(xlabel="input channel", ylabel="token", title="the same channels for every token")
axes[1].bar(range(len(magnitude)), magnitude, color=COLOURS["baseline"])
axes[1].set(xlabel="input channel", ylabel="mean |x|", title="a tenth of them is large")
drawn

# %% [markdown]
# The same thirteen channels stand out for every token, and the model predicts as it did.

# %%
outliers = np.argsort(magnitude)[-13:]
assert magnitude[outliers].mean() > 3 * np.median(magnitude)
assert abs(lab.perplexity(planted) / lab.base_perplexity - 1) < 1e-3, "the function is the same"

# %% [markdown]
# ## What hurts
#
# The function is the same, but rounding is not what it was: the columns that meet the large inputs hold small
# weights now, and share a grid with large ones. Here are all block layers at 3 bits, in groups of 32, each weight
# rounded to its nearest (RTN).

# %%
hurt = {}
for words, model in {"as trained": lab.model(), "outliers planted": awq.model_of(lab, True, seed=0)}.items():
    awq.round_model(model, 3, 32)
    hurt[words] = lab.perplexity(model)
drawn, axes = figure(height=2.0)
axes.barh(list(hurt), list(hurt.values()), color=COLOURS["baseline"])
axes.axvline(lab.base_perplexity, **series("reference"))
axes.set(xlabel="perplexity at 3 bits (dashed: full precision)", title="the same function, and harder to round")
assert lab.base_perplexity < hurt["as trained"] < hurt["outliers planted"]
drawn

# %% [markdown]
# ## Which weights matter?
#
# The paper's first experiment: keep a tenth of the columns in full precision and round the others. Which tenth would
# you keep: that with the largest weights, or that with the largest inputs? We try both, and a random one.

# %%
weight = planted.get_parameter(f"{name}.weight").detach().numpy().astype(float)
rounded = awq.quantize(weight, 3, 32).dequantize()
kept = {"none": [], "random": np.random.default_rng(0).permutation(len(magnitude))[:13],
        "largest weights": np.argsort(np.abs(weight).mean(axis=0))[-13:], "largest inputs": outliers}  # fmt: skip
errors = {}
for words, columns in kept.items():
    error = rounded - weight
    error[:, columns] = 0
    errors[words] = np.mean((x @ error.T) ** 2)

# %% [markdown]
# The bars are errors of the output, the whole rounding counting as 1. Keeping the largest weights helps as little as
# keeping any. The columns that meet the largest *inputs* carry most of the error.

# %%
drawn, axes = figure(height=1.9)
axes.barh(list(errors), [error / errors["none"] for error in errors.values()], color=COLOURS["baseline"])
axes.set(xlabel="output error, all columns rounded = 1", ylabel="columns kept")
axes.invert_yaxis()
assert errors["largest inputs"] < 0.6 * min(errors[words] for words in ("none", "random", "largest weights"))
drawn

# %% [markdown]
# ## The idea
#
# Two kinds of weights in one matrix would be slow and awkward to store. AWQ multiplies a column by s > 1 before
# rounding and divides it by s afterwards. The step of the grid stays what it was, as long as the column does not
# become the largest of its group, so the error of the column shrinks by s. If s is too large, it stretches the grids
# and all other columns suffer. Here the outlier columns get the same s, and the error is split by the columns that it
# comes from.


# %%
def split_error(factor, bits):
    """Output errors of the outlier columns and of the others, the outlier columns scaled by `factor`."""
    scales = np.where(np.isin(np.arange(len(magnitude)), outliers), factor, 1.0)
    error = awq.quantize(weight * scales, bits, 32).dequantize() / scales - weight
    parts = np.where(scales != 1, error, 0), np.where(scales != 1, 0, error)
    return [np.mean((x @ part.T) ** 2) / errors["none"] for part in parts]


# %% [markdown]
# Where is the best s? Turn the bits where the notebook is live.


# %%
def error_by_factor(bits=3):
    factors = np.geomspace(1.01, 30, 16)
    drawn, axes = figure(height=3.0)
    found = np.transpose([split_error(factor, bits) for factor in factors])
    for words, values, role in zip(("outlier columns", "other columns"), found, ("method", "baseline"), strict=True):
        axes.loglog(factors, values, **series(role), label=words)
    axes.set(xlabel="s, for the outlier columns only", ylabel="output error", title="s moves the error around")
    legend(axes)
    return drawn


# %% [markdown]
# The error of the columns that are scaled falls like 1/s². That of the others stays where it was until the grids are
# stretched, and then rises. Their sum is least in between. (The unit is the error of rounding everything at 3 bits.)

# %%
explore(error_by_factor, bits=[3, 4, 2])

# %% [markdown]
# As ranges:

# %%
small, middle, large = (split_error(factor, 3) for factor in (1.01, 3, 30))
assert middle[0] < small[0] / 3 and large[1] > small[1] and sum(middle) < min(sum(small), sum(large))

# %% [markdown]
# ## One number to search for
#
# A scale for every channel, but only one number to choose, the ratio r: $s_j = (\text{mean } |x_j|)^r$ for channel j
# (and all are divided by one number, so that the largest times the smallest is 1). With r = 0 nothing is scaled, with r
# near 1 all scaled inputs are level. `search_scales` tries 20 values and compares *outputs*; how the error goes with r
# is drawn further below. The best r lies inside. And since r = 0 is among the candidates, the search can never do worse
# than rounding to nearest, on the text that it was calibrated with.

# %%
found = awq.search_scales([weight], x, lambda weights: x @ weights[0].T, 3, 32)
nearest = np.mean((x @ (rounded - weight).T) ** 2)
np.testing.assert_allclose(found.losses[0], nearest)
assert 0 < found.ratio < 1 and found.losses.min() == found.losses[round(20 * found.ratio)] < 0.7 * nearest
ordinary = np.setdiff1d(np.arange(len(magnitude)), outliers)
assert np.median(found.scales[outliers]) > 1.5 * np.median(found.scales[ordinary])

# %% [markdown]
# ## Nothing is left to do at inference
#
# Somebody has to divide the inputs by s. They come from a norm, so its gain is divided instead, once. This is `fold`.
# Layers that share an input share s: q, k and v; gate and up. o gets its inputs from v, and down from up, each in
# proportion, so their s goes into the rows of v and of up.

# %%
for step in awq.steps(lab.model())[:4]:
    print(f"{step.previous:29} -> {', '.join(reader.rpartition('.')[2] for reader in step.readers)}")
with torch.no_grad():
    model, text = lab.model(), lab.validation[:2]
    before = model(text)
    readers = [model.get_submodule(f"blocks.1.feed_forward.{layer}") for layer in ("gate_proj", "up_proj")]
    awq.fold(model.get_submodule("blocks.1.feed_forward_norm"), readers, torch.from_numpy(found.scales))
    torch.testing.assert_close(model(text), before, rtol=1e-3, atol=1e-3)

# %% [markdown]
# ## Clip search
#
# The second half of the method is about the ends of the range. `search_clip` asks for each row of a group: would the
# output be nearer if the range were a little smaller, so that the largest weights are cut and all others get a finer
# grid? It tries ten sizes. At 3 bits, most groups say yes.

# %%
scaled, inputs = weight * found.scales, x / found.scales
limits = awq.search_clip(scaled, inputs, 3, 32)
kept = limits / np.abs(scaled).reshape(len(scaled), -1, 32).max(axis=-1)  # [out, groups]
drawn, axes = figure(height=2.2)
axes.hist(kept.ravel(), bins=np.arange(0.525, 1.05, 0.05), color=COLOURS["method"], rwidth=0.8)
axes.set(xlabel="share of the range that is kept", ylabel="groups", title="most groups give up their ends")
assert 0.54 < kept.min() and np.mean(kept < 0.99) > 0.5
drawn

# %% [markdown]
# Each group is judged by its own part of the output. The errors of the parts add up, and may also cancel, so this
# half comes with no guarantee; here it helps. Errors are relative to rounding to nearest.

# %%
clipped = awq.quantize(awq.clip(scaled, limits), 3, 32).dequantize() / found.scales
chain = {"scales": found.losses.min() / nearest, "and clip": np.mean((x @ (clipped - weight).T) ** 2) / nearest}
print({words: f"{value:.2f}" for words, value in chain.items()})
assert max(chain.values()) < 1

# %% [markdown]
# ## What it does to the model
#
# All blocks now, with and without planted channels, at 3 and 4 bits. On the left what each ratio does to attention in
# the first block: without outliers, scaling has little to win and the search stays near 0. On the right, before you
# look: which of the four models will be worst, and will AWQ bring it back to the others?

# %%
claim = awq.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# With outliers, rounding to nearest loses much more at 3 bits, and AWQ takes most of the difference back. Without
# them the two are closer, and at 4 bits there is hardly anything left to win. Planted outliers are all of one size; how
# much AWQ brings a large model this figure cannot say.

# %%
assert claim.holds
rise = {key: claim.numbers[f"rise, {key} 3 bits, outliers planted"] for key in ("RTN", "AWQ")}
assert rise["AWQ"] < 0.8 * rise["RTN"]

# %% [markdown]
# ## Packed
#
# The codes are stored as those of any other quantizer: `WeightOnlyLinear` holds them eight to an int32, and nothing
# in it knows about scales of channels, since they are folded away.

# %%
model = lab.model()
done = awq.quantize_model(model, lab.calibration(count=4), 4, group_size=32)
with torch.no_grad():
    expected = model(text)
    weight_only.use_packed(model, done)
    moved = (model(text) - expected).abs().max() / expected.abs().max()
assert moved < 1e-5  # float32's rounding, relative to the largest logit

# %% [markdown]
# ## The kernel, in bytes
#
# So AWQ shares the kernel of `weight_only`. For one token a 4096 × 4096 layer of Llama-7B reads 33.6 MB in bfloat16,
# and a quarter of that, with a little for scales and zero points, in 4 bits and groups of 128. The scales of the
# channels add no byte.

# %%
case = cases.cases("quantization.weight_only")[0]
dense = 2 * 4096 * 4096 + 2 * (4096 + 4096)
for label, size in (("bfloat16", dense), ("4 bits", case.bytes)):
    print(f"{label}: {size / 1e6:.1f} MB, at least {1e6 * size / hardware.GPUS['H200'].bandwidth:.1f} µs on an H200")
assert 3.7 < dense / case.bytes < 4

# %% [markdown]
# Timed on a GPU, beside cuBLAS on the dense weight and torch's own 4-bit product:

# %%
for row in bench.recorded("quantization.weight_only"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.weight_only"):
    print("not recorded yet: python -m kernels bench quantization.weight_only, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the grid, the scales, both searches, and the fold.
#
# ```
# python -m chapters exercise awq --to my
# python -m pytest --submission my tests/quantization/test_awq.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["awq"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["awq"])) == 5
