# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Calibration: how far shall the grid reach?
#
# A grid of b bits has 2^b evenly spaced values (the chapter `uniform` tells how). A weight's grid can be chosen with
# the weight in hand. An activation's grid, if it shall cost nothing at run time, must be chosen before the model runs,
# from samples. The question is where it ends: at the largest value ever seen, or earlier, so that the many small values
# get finer steps and a few large ones are clipped.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, legend, series
from chapters.lab import Lab
from chapters.quantization import calibration as cal
from kernels import bench, check
from kernels.quantization import calibration as kernel

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Here are the magnitudes that reach one layer of our model: the input of a feed-forward's down projection, where the
# product of gate and up has a long tail. The dashed lines are the levels that a symmetric grid of 4 bits has, if it
# reaches to the largest (its codes are −7 to 7). How many of the values will have the level 0? `collect` (and
# `histograms` for all layers of a model at once) counts them into 2048 bins, batch by batch, and keeps nothing else.

# %%
seen = cal.histograms(lab.model(), lab.calibration(count=32))
name = "blocks.2.feed_forward.down_proj"
counts, width = seen[name].counts, seen[name].width
edges = np.arange(len(counts)) * width
drawn, axes = figure(height=2.6)
axes.fill_between(edges, np.maximum(counts, 0.5), 0.5, step="post", color=COLOURS["baseline"])
for level in range(8):
    axes.axvline(level * edges[-1] / 7, color=COLOURS["reference"], linestyle="--", linewidth=1)
axes.set(xlabel="magnitude |x|", ylabel="values in a bin", yscale="log", title="dashed: the 8 levels of 4 bits")
drawn

# %% [markdown]
# Nearly all values lie in the first tenth of the range (mind the scale: each line up is a hundred times as many). Of
# the 8 levels they share one or two, and what lies below half a step becomes 0.

# %%
share, zeros = (counts[: len(counts) // part].sum() / counts.sum() for part in (10, 14))
assert share > 0.9
print(f"{share:.1%} of the values lie in the lowest tenth of the range; {zeros:.1%} become 0")

# %% [markdown]
# ## Two costs
#
# A limit below the largest value clips what lies beyond it; a limit at the largest value makes every step coarse.
# Both errors can be computed from the histogram alone: `errors` gives the mean squared error of what is rounded, and of
# what is clipped. `mse_limit` takes the limit where their sum is least.


# %%
def errors(limit, bits):
    centers, top = (np.arange(len(counts)) + 0.5) * width, 2 ** (bits - 1) - 1
    values = np.minimum(np.rint(centers / (limit / top)), top) * (limit / top)
    squared = (values - centers) ** 2 * counts / counts.sum()
    return squared[centers <= limit].sum(), squared[centers > limit].sum()


# %% [markdown]
# Swept over the limit, one error falls and the other rises.

# %%
limits = np.linspace(0.03, 1, 60) * edges[-1]
rounding, clipping = np.transpose([errors(limit, 4) for limit in limits])
best = cal.mse_limit(seen[name], 4, start=16)

# %% [markdown]
# Where is the sum least? Far below the largest magnitude, where one more value saved from clipping would cost all
# others more than it gains. (The clipping error falls to 0 at the right edge, outside of the picture.)

# %%
drawn, axes = figure(height=3)
axes.semilogy(limits, rounding, **series("baseline") | {"marker": ""}, label="rounding")
axes.semilogy(limits, np.maximum(clipping, 1e-9), **series("third") | {"marker": ""}, label="clipping")
axes.semilogy(limits, rounding + clipping, **series("method") | {"marker": ""}, label="both")
axes.axvline(best, color="black", linestyle="--", label="mse_limit")
axes.set(xlabel="limit of the grid, 4 bits", ylabel="mean squared error", ylim=(1e-7, None))
legend(axes)
drawn

# %% [markdown]
# Here is the same as seen by the values: what each magnitude becomes. A low limit gives fine steps and a flat end, a
# high one a coarse staircase. Turn limit and bits where the notebook is live, and look for the least error.


# %%
def staircase(percent=14, bits=4):
    limit, top = edges[-1] * percent / 100, 2 ** (bits - 1) - 1
    shown = np.linspace(0, min(3 * limit, edges[-1]), 1000)
    drawn, axes = figure(height=3.0)
    axes.plot(shown, shown, **series("reference"))
    axes.plot(shown, np.rint(np.minimum(shown / limit, 1) * top) * limit / top, **series("method") | {"marker": ""})
    lost = errors(limit, bits)
    axes.set(xlabel="magnitude |x|", ylabel="becomes", title=f"error: rounding {lost[0]:.1e}, clipping {lost[1]:.1e}")
    return drawn


# %% [markdown]
# Here the grid ends at 14% of the largest magnitude; the dashed line is what would keep every value. The steps are fine
# where nearly all values are; the few beyond the limit lose most of what they were.

# %%
explore(staircase, percent=(4, 100, 2), bits=(2, 8))

# %% [markdown]
# ## Another measure
#
# TensorRT looks at the shape of the distribution instead: P, the bins up to the limit with everything beyond added to
# the last, against Q, what is left of it when all bins of a level share their mean. `divergence` is $\mathrm{KL}(P
# \Vert Q) = \sum_i P_i \log (P_i / Q_i)$, which is 0 for equal distributions, and `entropy_limit` takes the limit where
# it is least. It was made for 8 bits. Three rules look at no error at all: *largest* takes the largest magnitude,
# *moving* a moving average of the largest of each batch, *percentile* cuts off one value in a thousand. Here is what
# each method chooses.

# %%
chosen = {
    f"{method}, {bits} bits" if method in ("mse", "entropy") else method: choose(seen[name], bits)
    for method, choose in cal.METHODS.items()
    for bits in (8, 4)
}

# %% [markdown]
# The fewer bits, the earlier the two searches clip: coarse steps make room dearer. The other three know of no bits.

# %%
drawn, axes = figure(height=2.8)
axes.barh(list(chosen), list(chosen.values()), color=COLOURS["method"])
axes.set(xlabel="limit chosen, as a magnitude", xscale="log")
axes.invert_yaxis()
assert chosen["mse, 4 bits"] < chosen["mse, 8 bits"] <= chosen["largest"]
drawn

# %% [markdown]
# ## In the model
#
# The claim gives the inputs of all block linears static grids, in each of the five ways and with 8 to 4 bits. The
# weights have 8. Even for 8 bits the five limits differ several times over: will the model notice?

# %%
claim = cal.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# With 8 bits there is room for the largest values; cutting them off can only lose. With 4 bits the limit decides.
# Cutting off one value in a thousand, without a look at any error, is nearly as good as the search for the least. The
# entropy, which knows only counts and not how far a clipped value is moved, cuts more than our model can bear. (This
# says nothing about other models: TensorRT uses it with 8 bits, where it costs little.)

# %%
assert claim.holds

# %% [markdown]
# ## The kernel, in bytes
#
# Collecting in separate steps reads the activations four times: magnitude, maximum, place, count. The kernel reads
# them once; its programs count by atomic additions in the L2 cache, each in a row of its own.

# %%
tokens, channels = 4096, 4096
steps = 2 * 5 + 4 * 3  # bytes a value: magnitude and maximum and quotient in 16 bits, places in 32
drawn, axes = figure(height=2.2)
axes.barh("in steps", steps * tokens * channels / 1e6, color=COLOURS["baseline"])
axes.barh("one pass", kernel.llama_case(tokens, channels).bytes / 1e6, color=COLOURS["method"])
axes.set(xlabel="megabytes for 4096 tokens of 4096 channels", title="read once instead of four times")
assert steps * tokens * channels > 8 * kernel.llama_case(tokens, channels).bytes
drawn

# %% [markdown]
# What the compiler makes of it for an H100 or H200 (sm_90):

# %%
report = check.static_report("quantization.calibration", [90])
for row in report:
    print(f"{row['case']:28} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside what torch offers for the same job:

# %%
for row in bench.recorded("quantization.calibration"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.calibration"):
    print("not recorded yet: python -m kernels bench quantization.calibration, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: counting, the percentile, the search for the least squared error, the divergence,
# and the kernel.
#
# ```
# python -m chapters exercise calibration --to my
# python -m pytest --submission my tests/quantization/test_calibration.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["calibration"]):
    print(f"{exercise.points} points  {exercise.function}")
