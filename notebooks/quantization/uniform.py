# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Uniform quantization: small integers times a step
#
# A weight in 16 bits is one of 65,536 numbers. With 4 bits it may be one of 16. This chapter is about where to put
# these 16, and every method in this part builds on it: choose a step, divide, round.
#
# It sounds too simple to have traps. But there are five published rules for the step, rounding has ties, codes must be
# packed, and one choice matters more than all others: how many numbers share a step.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import uniform
from kernels import bench, check
from kernels.quantization import uniform as kernel
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
weight = lab.weights["blocks.1.feed_forward.up_proj.weight"].numpy().astype(float)
rows, groups = np.abs(weight).max(axis=1), np.abs(weight).reshape(-1, 32).max(axis=1)

# %% [markdown]
# ## What hurts
#
# The largest number sets the step, for all that share it. On the left are 64 rows of one layer of our model, each
# weight as a cell: some rows are bright, some all but dark. On the right, the largest weight of every row of the layer,
# of every group of 32 neighbours in a row, and of the whole layer. One step for the whole layer is made for its one
# largest weight, and for nearly every other row it is too coarse.

# %%
drawn, axes = panels(2, width=9.0, height=2.8)
heatmap(axes[0], np.abs(weight[:64]), "|weight|", limit=0.5 * rows.max())
axes[0].set(xlabel="column", ylabel="row", title="rows differ in size")
for values, words, look in ((groups, "groups of 32", "bar"), (rows, "rows", "step")):
    options = {"histtype": look, "color": COLOURS["muted" if look == "bar" else "method"], "label": words}
    axes[1].hist(values, np.linspace(0, rows.max(), 30), weights=np.full(values.size, 100 / values.size), **options)
axes[1].axvline(rows.max(), color=COLOURS["baseline"], linestyle="--", label="the layer")
axes[1].set(xlabel="largest |weight|", ylabel="share, %", title="so do their largest weights")
legend(axes[1])
drawn

# %% [markdown]
# A typical row could do with a much smaller step than the layer's, and a typical group with a smaller one still.

# %%
assert np.median(groups) < np.median(rows) < 0.8 * rows.max()

# %% [markdown]
# ## The grid
#
# $$\text{code} = \operatorname{rint}(x / \text{scale}) + \text{zero} \qquad
# \text{value} = \text{scale} \cdot (\text{code} - \text{zero})$$
#
# `grid` finds scale and zero for a range, `quantize` the codes. Here are 12 weights on a grid of 3 bits. The grid is
# asymmetric: its 8 values go from the least weight to the greatest, and 0 is exactly one of them. That is what rounding
# the zero point is for: zeros are common (padding, pruned weights), and they should stay zeros.

# %%
x = weight[5, :12]
scale, zero = uniform.grid(np.minimum(x.min(), 0), np.maximum(x.max(), 0), bits=3)
codes = uniform.quantize(x, scale, zero, bits=3)
values = uniform.dequantize(codes, scale, zero)

# %% [markdown]
# Each weight moves to the nearest line. Where the notebook is live, turn the bits: each one more halves the distance of
# the lines. And try the symmetric schemes, which come further below.


# %%
def on_lines(bits=3, scheme="asymmetric"):
    scale, zero = uniform.grid(np.minimum(x.min(), 0), np.maximum(x.max(), 0), bits, scheme)
    lines, codes = uniform.dequantize(np.arange(2**bits), scale, zero), uniform.quantize(x, scale, zero, bits)
    drawn, axes = figure(height=2.6)
    axes.hlines(lines, 0, 11, color=COLOURS["muted"], linewidth=0.8)
    axes.plot(x, **series("baseline") | {"linestyle": ""})
    axes.plot(uniform.dequantize(codes, scale, zero), **series("method") | {"linestyle": ""})
    axes.set(xlabel="column", ylabel="weight", title=f"{2**bits} values; squares: weights, circles: where they go")
    return drawn


# %% [markdown]
# Seven steps, eight lines: the least weight and the greatest are near a line, the others go where they must.

# %%
explore(on_lines, bits=(2, 6), scheme=list(uniform.SCHEMES))

# %% [markdown]
# No weight moved by more than half a step (a rounded zero point may move the ends of the grid: then up to half a step
# more is clipped there).

# %%
print("codes:", codes, "zero:", int(zero))
assert np.abs(values - x).max() <= scale + 1e-12
assert uniform.dequantize(zero.astype(np.uint8), scale, zero) == 0

# %% [markdown]
# ## Ties
#
# A number halfway between two codes goes to the even one. Always rounding up would shift the mean of all that is
# rounded. What do −2.5, −1.5 and 0.5 become? (It is not what school taught.) The zero point is added after rounding;
# added before, an odd one would turn all ties around.

# %%
halves = np.arange(-2.5, 3)
rounded_first = uniform.quantize(halves, np.array(1.0), np.array(3.0), bits=4) - 3.0
print(dict(zip(halves.tolist(), rounded_first.tolist(), strict=True)))
assert (rounded_first % 2 == 0).all() and (np.rint(halves + 3) - 3 != rounded_first).any()

# %% [markdown]
# ## Five symmetric rules
#
# With 0 in the middle there is no zero point to store. But $2^b$ is even: one of the middle codes is 0, and there is
# one more code below than above. Whoever writes a quantizer has to decide what to do about it, and released code
# decides in five ways. Here are the 8 values of each at 3 bits, for weights from −1 to 1 (the shaded band).

# %%
drawn, axes = figure(height=2.3)
for place, scheme in enumerate(uniform.SYMMETRIC):
    step, middle = uniform.grid(np.array(-1.0), np.array(1.0), 3, scheme)
    points = uniform.dequantize(np.arange(8), step, middle)
    axes.plot(points, np.full(8, place), "|", markersize=18, markeredgewidth=2, color=COLOURS["method"])
axes.axvspan(-1, 1, color=COLOURS["muted"], alpha=0.2)
axes.set(xlabel="value", yticks=range(5), yticklabels=uniform.SYMMETRIC, ylim=(-0.6, 4.6), title="8 values, five rules")
drawn

# %% [markdown]
# `smoothquant` (also LLM.int8 and others) reaches both ends and never uses its lowest code. `deepspeed` has the
# smallest step, and clips the greatest weight by one step. `gptq` and `torch` lie between. They differ only where a
# group has no negative number. `no_clipping` looks which side is longer. None is wrong, but codes of one with the scale
# of another are.

# %%
found = {scheme: uniform.grid(np.array(-1.0), np.array(1.0), 3, scheme)[0] for scheme in uniform.SYMMETRIC}
assert found["deepspeed"] < found["torch"] == found["gptq"] < found["smoothquant"] == found["no_clipping"]
ratio = float(found["smoothquant"] / found["deepspeed"])
print(f"deepspeed's codes with smoothquant's scale: every value is {ratio:.2f} times too large")
assert ratio > 1.3

# %% [markdown]
# ## Who shares a step
#
# Cutting a tensor into groups is nothing but a reshape: `x.reshape(-1, n)` has one grid per row, with n the size of the
# tensor, of a row, or less. `sharing` translates the usual words into n (a *channel* is a row of a weight). The smaller
# n, the smaller the error, and the more there is to store: 16 bits of scale and 4 of zero point for each n weights.
# Here is the layer at 4 bits.

# %%
cuts = [("tensor", None), ("channel", None), ("group", 64), ("group", 32), ("group", 16)]
sizes = [uniform.sharing(weight.shape, *cut) for cut in cuts]
errors = [np.sqrt(np.mean((uniform.rounded(weight, 4, *cut) - weight) ** 2) / np.mean(weight**2)) for cut in cuts]
drawn, axes = figure(height=2.6)
axes.plot([4 + 20 / size for size in sizes], errors, **series("method"))
for (name, _), size, error in zip(cuts, sizes, errors, strict=True):
    up = -15 if name == "channel" else 6
    axes.annotate(name if size > 64 else size, (4 + 20 / size, error), xytext=(0, up), textcoords="offset points")
axes.set(xlabel="bits per weight, scale and zero included", ylabel="rms error / rms weight", ylim=(0, 1.2 * errors[0]))
drawn

# %% [markdown]
# ## In the model
#
# From the tensor to the channel is the largest gain, for a sixth of a bit. Does the model see it so, too? The claim
# rounds the weights of all blocks, at 4 bits and at 3, with one grid per tensor, per channel and in groups, and with
# each symmetric rule. What do you expect to matter more: who shares a grid, or by which rule its step is found?

# %%
assert (np.diff(errors) < 0).all()
claim = uniform.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Who shares a grid decides; the rule for its step comes second. But at 3 bits it is worth a good deal: on the right,
# the rules with small steps that clip a little win, because many weights are small and very few are the largest. Do not
# carry that over to more bits: the finer the steps, the less there is to win by clipping.

# %%
assert claim.holds
assert claim.numbers["perplexity, 3 bits, deepspeed"] < claim.numbers["perplexity, 3 bits, smoothquant"]

# %% [markdown]
# ## Activations: dynamic or static
#
# Weights are rounded once. Activations come new with every token. *Dynamic*: find the range of each token when it is
# there. *Static*: find one range on sample text, beforehand, which costs nothing at run time. Large models have a few
# activation channels that are much larger than the rest; we plant four, which leaves the function of the model as it
# is. Now all tokens share a step that was made for outliers: a token's own step is better, but has outliers, too.


# %%
def with_inputs(tokens, bits=6):
    model = lab.model()
    surgery.plant_outliers(model, channels=4, factor=16)
    uniform.round_inputs(model, bits, tokens)
    return lab.perplexity(model)


# %% [markdown]
# Planted outlier channels make the difference plain: a grid per token, or one for all that comes.

# %%
sample = lab.calibration(seed=0, count=32)
perplexities = {"plain": lab.base_perplexity, "dynamic": with_inputs(None), "static": with_inputs(sample)}
drawn, axes = figure(height=2.0)
axes.barh(list(perplexities), list(perplexities.values()), color=COLOURS["method"])
axes.set(xlabel="perplexity, inputs of 6 bits (plain: not rounded)", title="a step for each token, or one for all")
assert perplexities["plain"] < perplexities["dynamic"] < perplexities["static"]
drawn

# %% [markdown]
# The chapters on SmoothQuant and LLM.int8 are about these outliers. Without calibration text there are no static
# parameters, and none are made up:

# %%
try:
    uniform.running_range([])
except ValueError as error:
    print(error)

# %% [markdown]
# ## Packing
#
# Two codes of 4 bits fill a byte. Codes of 3 bits do not, but there is no need to waste the rest: `pack` writes bit
# after bit, and 32 codes fill three 32-bit words. Codes 10 and 21 cross from one word to the next. Here is which code
# each bit belongs to.

# %%
drawn, axes = figure(width=7.0, height=1.6)
heatmap(axes, np.repeat(np.arange(32), 3).reshape(3, 32), "code")
axes.set(xlabel="bit, lowest first", ylabel="word")
for code in range(32):
    word, bit = divmod(3 * code, 32)
    axes.text(bit, word, code, fontsize=7, ha="center", va="center", color="white" if code < 22 else "black")
drawn

# %% [markdown]
# Packing and unpacking are inverse to each other, whatever the number of bits.

# %%
codes = np.random.default_rng(0).integers(0, 8, (2, 64)).astype(np.uint8)
packed = uniform.pack(codes, bits=3)
assert packed.nbytes == codes.size * 3 // 8
np.testing.assert_array_equal(uniform.unpack(packed, bits=3), codes)

# %% [markdown]
# ## The kernel, in bytes
#
# Quantizing is all memory traffic. The kernel keeps a group in registers between finding its range and rounding it:
# numbers in, codes out. One operator after the other reads the numbers twice and moves the codes twice more. Per
# number, in bytes, from bfloat16 in groups of 128:

# %%
for bits in (8, 4, 3, 2):
    fused = 2 + bits / 8 + 5 / 128  # numbers, codes, and a share of the scale and the zero
    separate = fused + 2 + 1 + 1  # numbers read again; a byte for each code written, and read
    print(f"{bits} bits: one pass {fused:.2f} bytes, one operator after the other {separate:.2f}")
    assert separate > 2 * fused
fused = kernel.llama_case("", 14336, 4096, 4, 128, "asymmetric").bytes / (14336 * 4096)
assert abs(fused - (2 + 4 / 8 + 5 / 128)) < 1e-9

# %% [markdown]
# What the compiler makes of it for an H100 or H200 (sm_90) can be seen without having one: 128-bit loads, no spilled
# registers.

# %%
report = check.static_report("quantization.uniform", [90])
for row in report:
    print(f"{row['case']:42} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's operators and what torch's compiler makes of them:

# %%
for row in bench.recorded("quantization.uniform"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.uniform"):
    print("not recorded yet: python -m kernels bench quantization.uniform, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the grids, rounding, static ranges, packing, and the kernel.
#
# ```
# python -m chapters exercise uniform --to my
# python -m pytest --submission my tests/quantization/test_uniform.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["uniform"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["uniform"])) == 5
