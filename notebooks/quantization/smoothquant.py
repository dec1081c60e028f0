# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # SmoothQuant: move the outliers to where they do no harm
#
# Tensor cores multiply int8 twice as fast as 16-bit numbers. For that, activations must be int8, too, and not only
# weights. In large models a few channels of the activations are up to a hundred times larger than the rest. A grid
# that reaches up to them has no steps left for the others.
#
# Small models do not grow such channels. So we plant two in ours, and see what they do and how they are removed.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.figures import COLOURS, figure, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import smoothquant
from kernels import bench, check, hardware
from kernels.quantization import smoothquant as kernel

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# `plant_outliers` multiplies two channels of every norm's gain by 100 and divides the columns that read them by 100.
# The model computes what it did before. Here is the largest input of each channel that one attention layer reads.

# %%
tokens, (model, _) = lab.calibration(0, 32), smoothquant.prepared(lab, seed=0, alpha=None)
name = "blocks.1.attention.q_proj"
act_max = smoothquant.input_maxima(model, tokens, [name])[name].numpy()
readers = [smoothquant.as_array(model.get_parameter(f"blocks.1.attention.{p}_proj.weight")) for p in "qkv"]
weight_max = np.abs(np.concatenate(readers)).max(axis=0)
drawn, axes = figure(height=2.2)
axes.plot(act_max, color=COLOURS["accent"])
axes.set(xlabel="channel", ylabel="largest |input|", ylim=(0, None))
drawn

# %% [markdown]
# An int8 grid for all of these inputs has steps of the largest over 127. Count the codes that an ordinary channel can
# still take: a handful of the 255.

# %%
step = smoothquant.absmax_scale(act_max[None], per_row=False)[0]
codes = np.floor(act_max / step)
print(f"largest code of the median channel: {np.median(codes):.0f} of 127")
assert codes.max() >= 126 and np.median(codes) < 13

# %% [markdown]
# ## The idea
#
# The norm multiplies every channel by a gain. Divide that gain by $s_j$, multiply column $j$ of all layers that read
# the norm by $s_j$, and nothing else changes:
#
# $$s_j = \frac{\max |X_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}$$
#
# $\alpha = 1$ makes all input channels equally large and leaves all unevenness to the weights, $\alpha = 0$ the other
# way round. At ½ the two get the same maxima, channel by channel.

# %%
drawn, axes = panels(3, height=2.2, sharey=True)
for axis, alpha in zip(axes, (0, 0.5, 1), strict=True):
    s = smoothquant.smoothing_scale(act_max, readers, alpha)
    axis.plot(act_max / s, color=COLOURS["accent"], label="inputs")
    axis.plot(weight_max * s, color=COLOURS["method"], label="weights")
    axis.set(title=f"α = {alpha}", xlabel="channel", yscale="log")
legend(axes[1], loc="lower right")
drawn

# %% [markdown]
# Where are the two outliers? Gone, at every α. What was planted sits in the inputs and, upside down, in the weights,
# and $s$ contains it whole. What α decides about is how uneven *input times weight* is, which no such planting
# changes. In large models the weights have no small columns that fit the outliers, and α matters more.

# %%
s = smoothquant.smoothing_scale(act_max, readers, 0.5)
np.testing.assert_allclose(act_max / s, weight_max * s, rtol=1e-5)
planted = np.array([2.0**k for k in np.random.default_rng(0).integers(0, 7, len(s))])
again = smoothquant.smoothing_scale(act_max * planted, [weight / planted for weight in readers], 0.5)
np.testing.assert_allclose(again, planted * s)

# %% [markdown]
# `fold` writes $s$ into the norm and the weights. Three numbers through a gain and a layer, before and after:

# %%
x, gain, weight = np.array([[1.0, -1.0, 0.5]]), np.array([1.0, 80.0, 2.0]), np.array([[0.5, 0.01, 0.2]])
(smooth_gain,), (smooth_weight,) = smoothquant.fold([gain], [weight], np.array([1.0, 40.0, 2.0]))
print("input ", x * gain, "->", x * smooth_gain)
print("weight", weight, "->", smooth_weight)
np.testing.assert_allclose((x * smooth_gain) @ smooth_weight.T, (x * gain) @ weight.T)

# %% [markdown]
# ## Eight bits on both sides
#
# `absmax_scale` and `quantize` round a matrix: one scale for all of it, or one for each row. A row is a token of the
# activations or an output channel of the weights. Why never a column? Because a scale must come out of the sum over
# the columns, and only what is the same in all of its terms does:
#
# $$y_{mn} = \sum_k \underbrace{c_{mk} s_m}_{x} \, \underbrace{d_{nk} t_n}_{w} = s_m t_n \sum_k c_{mk} d_{nk}$$
#
# That is what SmoothQuant works around: it puts the scale of a column into the column.

# %%
x = np.random.default_rng(0).normal(size=(64, 128)) * np.where(np.arange(128) == 5, 100, 1)
weight = np.random.default_rng(1).normal(size=(32, 128))
s = smoothquant.smoothing_scale(np.abs(x).max(axis=0), [weight], 0.5)
for words, parts in {"plain": (x, weight), "smoothed": (x / s, weight * s)}.items():
    scales = [smoothquant.absmax_scale(part, per_row=False) for part in parts]
    codes = [smoothquant.quantize(part, scale) for part, scale in zip(parts, scales, strict=True)]
    error = smoothquant.w8a8_matmul(*codes, *scales) - x @ weight.T
    print(f"{words:9} error {np.linalg.norm(error) / np.linalg.norm(x[:, 6:] @ weight[:, 6:].T):.1%} of the plain part")

# %% [markdown]
# ## In the model
#
# The claim rounds all linear layers of all blocks: with a scale per token (O1), per tensor (O2), or per tensor and
# fixed beforehand (O3), with and without smoothing. What `o_proj` and `down_proj` read comes from no norm, so nothing
# is smoothed there. The sweep measures the layers behind the norms alone.

# %%
claim = smoothquant.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Too small an α leaves the inputs uneven, too large a one makes the weights so.

# %%
assert claim.holds
errors = {name: value for name, value in claim.numbers.items() if name.startswith("output error, α")}
assert min(errors, key=errors.__getitem__) not in ("output error, α = 0", "output error, α = 1")

# %% [markdown]
# And the levels. A scale per token saves much even without smoothing, because it lets tokens without a large outlier
# have small steps; but every token meets the outlier channels.

# %%
for way in ("naive", "smooth"):
    rises = {level: claim.numbers[f"rise, {way}, {level}"] for level in smoothquant.LEVELS}
    print(f"{way:6} perplexity rises by", ", ".join(f"{rise:.2f} at {level}" for level, rise in rises.items()))
assert all(claim.numbers[f"rise, smooth, {level}"] < claim.numbers[f"rise, naive, {level}"] for level in ("O1", "O2"))

# %% [markdown]
# ## The kernel, in bytes
#
# For a 4096 × 4096 layer and few tokens, the weights are what takes the time: int8 halves it. For many tokens it is
# arithmetic: int8 halves it again. So W8A8 gains at both ends, where 4-bit weights gain at one. Here is the least
# time on an H200.

# %%
gpu, counts = hardware.GPUS["H200"], 2 ** np.arange(14)
floors = [hardware.floor_seconds(kernel.llama_case(int(count), 4096, 4096), gpu) for count in counts]
half = [max((2 * 4096**2 + 16384 * m) / gpu.bandwidth, 2 * m * 4096**2 / gpu.bf16) for m in counts]
drawn, axes = figure(height=2.8)
axes.loglog(counts, 1e6 * np.array(half), **series("baseline"), label="bfloat16")
axes.loglog(counts, 1e6 * np.array(floors), **series("method"), label="W8A8")
axes.set(xlabel="tokens", ylabel="least microseconds")
legend(axes)
assert 1.9 < half[0] / floors[0] < 2.1 and 1.9 < half[-1] / floors[-1] < 2.1
drawn

# %% [markdown]
# What the compiler makes of the kernel for an H100 or H200 (sm_90): no spilled registers, and IGMMA, which is wgmma
# for integers, once there are 64 rows for it.

# %%
report = check.static_report("quantization.smoothquant", [90])
for row in report:
    copies = f"{row['bulk_copies']} TMA" if row["bulk_copies"] else f"{row['async_copies']} asynchronous"
    print(f"{row['case']:42} {row['registers']:3} registers, {copies} copies, {row['tensor_instructions']}")
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's own int8 product and cuBLAS in bfloat16:

# %%
for row in bench.recorded("quantization.smoothquant"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.smoothquant"):
    print("not recorded yet: python -m kernels bench quantization.smoothquant, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Write the scale, the folding, the int8 grid and its rounding, and the kernel.
#
# ```
# python -m chapters exercise smoothquant --to my
# python -m pytest --submission my tests/quantization/test_smoothquant.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["smoothquant"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["smoothquant"])) == 5
