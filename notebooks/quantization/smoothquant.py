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
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import smoothquant
from kernels import bench, check, hardware
from kernels.quantization import smoothquant as kernel
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
tokens, (model, _) = lab.calibration(0, 32), smoothquant.prepared(lab, seed=0, alpha=None)  # not smoothed yet
name = "blocks.1.attention.q_proj"

# %% [markdown]
# ## What hurts
#
# `plant_outliers` multiplies two channels of every norm's gain by 100 and divides the columns that read them by 100.
# The model computes what it did before. Here is what one attention layer reads, 48 tokens, a row each (colours end at
# 4, or nothing else could be seen), and the largest input of each channel.

# %%
readers = [smoothquant.as_array(model.get_parameter(f"blocks.1.attention.{p}_proj.weight")) for p in "qkv"]
weight_max = np.abs(np.concatenate(readers)).max(axis=0)
act_max = smoothquant.input_maxima(model, tokens, [name])[name].numpy()
drawn, axes = panels(2, width=9.0, height=2.6)
((_, seen),) = surgery.record_inputs(model, tokens[:1], [name])
heatmap(axes[0], np.abs(seen[0, :48].numpy()), "|input|", limit=4)
axes[0].set(xlabel="channel", ylabel="token", title="two stripes")
axes[1].plot(act_max, color=COLOURS["baseline"])
axes[1].set(xlabel="channel", ylabel="largest |input|", title="far above the rest")
drawn

# %% [markdown]
# An int8 grid for all of these inputs has steps of the largest over 127. Count the codes that an ordinary channel can
# still take: a handful of the 255 (from −127 to 127).

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
# $X_j$ is channel $j$ of the inputs, over all tokens of a calibration text, and $W_j$ column $j$ of all layers that
# read it. $\alpha = 1$ makes all input channels equally large and leaves all unevenness to the weights, $\alpha = 0$
# the other way round. At ½ the two get the same maxima, channel by channel. What will become of the two outliers at
# each α?


# %%
def maxima_at(alpha=0.5):
    drawn, axes = panels(3, width=9.0, height=2.8, sharey=True)
    for axis, each in zip(axes, (0.0, alpha, 1.0), strict=True):
        s = smoothquant.smoothing_scale(act_max, readers, each)
        axis.plot(act_max / s, **series("baseline") | {"marker": ""}, label="inputs")
        axis.plot(weight_max * s, **series("second") | {"marker": ""}, label="weights")
        axis.set(title=f"α = {each:g}", xlabel="channel", yscale="log")
    axes[0].set(ylabel="largest magnitude")
    legend(axes[2], loc="lower right")
    return drawn


# %% [markdown]
# In the middle the two lines are one. Where the notebook is live, move the α of that panel towards either end.

# %%
explore(maxima_at, alpha=(0.0, 1.0, 0.125))

# %% [markdown]
# Where are the two outliers? Gone, at every α. (They were at the channels of the two stripes.) What was planted sits in
# the inputs and, upside down, in the weights, and $s$ contains it whole. What α decides about is how uneven *input
# times weight* is, which no such planting changes. In large models the weights have no small columns that fit the
# outliers, and α matters more.

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
# activations or an output channel of the weights, with codes $c$ and $d$ and scales $s$ and $t$. Why never a column?
# Because a scale must come out of the sum over the columns, and only what is the same in all of its terms does:
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
# is smoothed there. The sweep measures the layers behind the norms alone. How much do you expect α to matter?

# %%
claim = smoothquant.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Too small an α leaves the inputs uneven, too large a one makes the weights so. But mind the note in the figure: any α
# is far better than none, and the best of them little better than its neighbours.

# %%
assert claim.holds
errors = {name: value for name, value in claim.numbers.items() if name.startswith("output error, α")}
assert min(errors, key=errors.__getitem__) not in ("output error, α = 0", "output error, α = 1")

# %% [markdown]
# And the levels. A scale per token saves much even without smoothing, because it lets tokens without a large outlier
# have small steps; but every token meets the outlier channels. The scale of rises is logarithmic.

# %%
drawn, axes = figure(height=2.6)
for way, role in (("naive", "baseline"), ("smooth", "method")):
    rises = [max(claim.numbers[f"rise, {way}, {level}"], 1e-3) for level in smoothquant.LEVELS]
    axes.plot(range(3), rises, **series(role) | {"linestyle": "", "markersize": 9}, label=way)
axes.set(xticks=range(3), xticklabels=list(smoothquant.LEVELS.values()), ylabel="rise of perplexity", yscale="log")
axes.set(xlim=(-0.5, 2.5), title="O1, O2, O3, without smoothing and with it")
legend(axes, loc="center left")
assert all(claim.numbers[f"rise, smooth, {level}"] < claim.numbers[f"rise, naive, {level}"] for level in ("O1", "O2"))
drawn

# %% [markdown]
# ## The kernel, in bytes
#
# For a 4096 × 4096 layer and few tokens, the weights are what takes the time: int8 halves it. For many tokens it is
# arithmetic: int8 halves it again. So W8A8 (weights and activations in 8 bits) gains at both ends, where 4-bit weights
# gain at one. Here is the least time on an H200.

# %%
gpu, counts = hardware.GPUS["H200"], 2 ** np.arange(14)
floors = [hardware.floor_seconds(kernel.llama_case(int(count), 4096, 4096), gpu) for count in counts]
half = [max((2 * 4096**2 + 16384 * m) / gpu.bandwidth, 2 * m * 4096**2 / gpu.bf16) for m in counts]
drawn, axes = figure(height=2.8)
axes.loglog(counts, 1e6 * np.array(half), **series("baseline"), label="bfloat16")
axes.loglog(counts, 1e6 * np.array(floors), **series("method"), label="W8A8")
axes.set(xlabel="tokens multiplied at once", ylabel="least time, µs", title="half the bytes, and half the arithmetic")
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
