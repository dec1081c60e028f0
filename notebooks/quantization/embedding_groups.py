# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Embedding groups: a grid of their own for the few wide channels
#
# Weights are easy to round: those of a row all have about the same size. Activations are not. In large transformers a
# few channels of the embedding axis carry values tens of times as large as the others, in every layer and every token.
# This notebook shows what that does to 8 bits, and the cheapest cure: a handful of grids instead of one.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, panels
from chapters.lab import Lab
from chapters.quantization import embedding_groups as peg
from kernels import bench, check
from kernels.quantization import embedding_groups as kernel
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Our model is too small to have grown outlier channels. We plant two, without changing what it computes: the gain of
# each norm is multiplied by 64 in two channels, and the columns of the layers that read them are divided by 64. This is
# what then reaches the queries of the second block: for each channel a bar from its least to its greatest value.

# %%
model = lab.model()
outliers = surgery.plant_outliers(model, peg.CHANNELS, peg.FACTOR)
ranges = peg.input_ranges(model, lab.calibration(count=16))
low, high = ranges["blocks.1.attention.q_proj"]
drawn, axes = figure(height=2.6)
axes.bar(np.arange(len(low)), high - low, bottom=low, color=COLOURS["baseline"], width=1)
axes.set(xlabel="channel", ylabel="from least to greatest", title="two channels are much wider than the rest")
assert set(np.argsort(high - low)[-2:]) == set(outliers)
drawn

# %% [markdown]
# A grid of 8 bits has 256 values, from the least to the largest of all these. How many of them fall into the range of a
# plain channel? Here is the width of each channel's range, counted in steps of that grid.

# %%
order = peg.group_order(low, high)
scale, zero = peg.find_grids(low, high, order, 1)
steps = (high - low) / scale[0]
drawn, axes = figure(height=2.4)
axes.hist(steps, bins=np.geomspace(steps.min(), 256, 40), color=COLOURS["baseline"])
axes.set_xscale("log")
axes.set(xlabel="values that one grid for all leaves a channel", ylabel="channels", title="a handful of 256 values")
assert np.median(steps) < 16
drawn

# %% [markdown]
# ## The idea
#
# A grid for each channel would cure it, but its scale would stand inside the sum over channels of the product that
# follows, and integers could not be summed. So channels get grids in K groups, and the product is K integer sums,
# each scaled once. Sorting the channels by range first puts the wide ones into one group: `group_order` says which
# channel stands at which place, and groups are runs of places.

# %%
drawn, axes = panels(2, width=9, height=2.6, sharey=True)
for axis, place, words in zip(axes, (np.arange(len(low)), order), ("in order", "sorted"), strict=True):
    axis.bar(np.arange(len(low)), (high - low)[place], color=COLOURS["method"], width=1)
    for edge in range(0, len(low) + 1, len(low) // 8):
        axis.axvline(edge - 0.5, color=COLOURS["muted"], linewidth=0.8)
    axis.set(xlabel="place", title=f"8 groups, channels {words}", yscale="log")
axes[0].set(ylabel="range")
drawn

# %% [markdown]
# Most groups are spared on the left, too, but on the right there is one fewer with a wide channel in it. `find_grids`
# gives each group the range of its widest channel; `quantize_groups` turns activations into codes, in the order of the
# groups. We try it on 24 tokens, and measure how far each value moves.

# %%
x = next(seen for _, seen in surgery.record_inputs(model, lab.calibration(count=1), ["blocks.1.attention.q_proj"]))
x = x[0, :24].numpy()


def moved_by(groups, ordering):
    grids = peg.find_grids(low, high, ordering, groups)
    scale, zero = (part.repeat(len(low) // groups) for part in grids)
    return np.abs((peg.quantize_groups(x, ordering, *grids) - zero) * scale - x[:, ordering])


worst = float(moved_by(1, order).max())


# %% [markdown]
# Left, one grid: the error stands everywhere. Right, 8 groups: only in the group of the wide channels. Turn the number
# of groups where the notebook is live, and take the channels as they come instead of sorted.


# %%
def error_maps(groups=8, sort=True):
    ordering = order if sort else np.arange(len(low))
    drawn, axes = panels(2, width=9, height=2.8)
    for axis, count in zip(axes, (1, groups), strict=True):
        error = moved_by(count, ordering)
        heatmap(axis, error, "error", limit=worst)
        axis.set(xlabel="place" + (", by rising range" if sort else ""), ylabel="token")
        axis.set_title(f"{count} grid{'s' * (count > 1)}: mean error {error.mean():.3f}")
    return drawn


# %% [markdown]
# With sorted channels each doubling of the groups halves the share that suffers.

# %%
explore(error_maps, groups=[8, 1, 2, 4, 16, 32], sort=[True, False])

# %% [markdown]
# As ranges:

# %%
assert 4 * moved_by(8, order).mean() < moved_by(1, order).mean()
assert moved_by(2, order).mean() < moved_by(2, np.arange(len(low))).mean()

# %% [markdown]
# ## What it costs
#
# The product of 8-bit codes needs one rescaling for each group. `grouped_product` does it in integers; it equals the
# product of the values that the codes stand for.

# %%
grids = peg.find_grids(low, high, order, 8)
codes = peg.quantize_groups(x, order, *grids)
weight_codes = np.random.default_rng(0).integers(-127, 128, (5, len(low))).astype(np.int8)
y = peg.grouped_product(codes, *grids, weight_codes, 0.01)
scale, zero = (part.repeat(len(low) // 8) for part in grids)
np.testing.assert_allclose(y, (codes - zero) * scale.astype(float) @ (0.01 * weight_codes.T.astype(float)), rtol=1e-9)

# %% [markdown]
# ## In the model
#
# The claim rounds all weights of the blocks and all their inputs to 8 bits, with static ranges from calibration text,
# and sweeps the number of groups. How many do you expect to need, sorted and not?

# %%
claim = peg.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# One group is the usual grid per tensor, and it breaks. A few groups bring back most of what is lost, and fewer are
# enough if channels are sorted. With many groups the order matters little: every group is small, and two wide channels
# spoil two of them at most. The paper used 6 sorted groups in BERT, and only where the feed-forward needs them.

# %%
assert claim.holds

# %% [markdown]
# ## The kernel, in bytes
#
# Written in separate steps (permute, divide, round, add and clip, narrow to a byte), quantizing an activation moves
# each value many times. The kernel reads a row once as it stands, permutes it on chip, and writes one byte a value.

# %%
tokens, channels = 4096, 4096
steps = {"permute": 4, "divide": 4, "round": 4, "add, clip": 8, "narrow": 3}  # bytes a value, 16-bit activations
drawn, axes = figure(height=2.2)
axes.barh("in steps", sum(steps.values()) * tokens * channels / 1e6, color=COLOURS["baseline"])
axes.barh("fused", kernel.llama_case(tokens, channels, 8).bytes / 1e6, color=COLOURS["method"])
axes.set(xlabel="megabytes for 4096 tokens of 4096 channels", title="one pass moves an eighth")
assert sum(steps.values()) * tokens * channels > 7 * kernel.llama_case(tokens, channels, 8).bytes
drawn

# %% [markdown]
# What the compiler makes of it for an H100 or H200 (sm_90): no spilled registers, loads of 128 bits.

# %%
report = check.static_report("quantization.embedding_groups", [90])
for row in report:
    print(f"{row['case']:24} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside what torch offers for the same job:

# %%
for row in bench.recorded("quantization.embedding_groups"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.embedding_groups"):
    print("not recorded yet: python -m kernels bench quantization.embedding_groups, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Four functions are left to you: the grids of groups, the codes, the integer product, and the kernel.
#
# ```
# python -m chapters exercise embedding_groups --to my
# python -m pytest --submission my tests/quantization/test_embedding_groups.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["embedding_groups"]):
    print(f"{exercise.points} points  {exercise.function}")
