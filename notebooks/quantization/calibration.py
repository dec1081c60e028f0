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
# A weight's grid can be chosen with the weight in hand. An activation's grid, if it shall cost nothing at run time,
# must be chosen before the model runs, from samples. The question is where it ends: at the largest value ever seen,
# or earlier, so that the many small values get finer steps and a few large ones are clipped.

# %%
import numpy as np
import torch

from chapters import workbook
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
# product of gate and up has a long tail. `collect` (and `histograms` for all layers of a model at once) counts them
# into 2048 bins, batch by batch, and keeps nothing else.

# %%
seen = cal.histograms(lab.model(), lab.calibration(count=32))
name = "blocks.2.feed_forward.down_proj"
counts, width = seen[name].counts, seen[name].width
edges = np.arange(len(counts)) * width
drawn, axes = figure(height=2.6)
axes.fill_between(edges, np.maximum(counts, 0.5), 0.5, step="post", color=COLOURS["baseline"])
axes.set(xlabel="magnitude", ylabel="values in a bin", yscale="log")
drawn

# %% [markdown]
# Nearly all values lie in the first tenth of the range. A grid of 4 bits to the largest value has 8 levels of
# magnitude, of which those values share one or two.

# %%
share = counts[: len(counts) // 10].sum() / counts.sum()
assert share > 0.9
print(f"{share:.1%} of the values lie in the lowest tenth of the range")

# %% [markdown]
# ## Two costs
#
# A limit below the largest value clips what lies beyond it; a limit at the largest value makes every step coarse.
# Both errors can be computed from the histogram alone. `mse_limit` takes the limit where their sum is least.


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
# Their sum has its least value well below the largest magnitude.

# %%
drawn, axes = figure(height=3)
axes.semilogy(limits, rounding, **series("baseline") | {"marker": ""}, label="rounding")
axes.semilogy(limits, np.maximum(clipping, 1e-9), **series("third") | {"marker": ""}, label="clipping")
axes.semilogy(limits, rounding + clipping, **series("method") | {"marker": ""}, label="both")
axes.axvline(best, color="black", linestyle="--", label="mse_limit")
axes.set(xlabel="limit", ylabel="squared error", ylim=(1e-7, None))
legend(axes)
drawn

# %% [markdown]
# ## Another measure
#
# TensorRT looks at the shape of the distribution instead: P, the bins up to the limit with everything beyond added to
# the last, against Q, what is left of it when all bins of a level share their mean. `divergence` is KL(P ‖ Q), and
# `entropy_limit` takes the limit where it is least. It was made for 8 bits. Here is what each method chooses.

# %%
chosen = {
    f"{method}, {bits} bits" if method in ("mse", "entropy") else method: choose(seen[name], bits)
    for method, choose in cal.METHODS.items()
    for bits in (8, 4)
}

# %% [markdown]
# The fewer bits, the earlier the two searches clip.

# %%
drawn, axes = figure(height=2.8)
axes.barh(list(chosen), list(chosen.values()), color=COLOURS["method"])
axes.set(xlabel="limit", xscale="log")
axes.invert_yaxis()
assert chosen["mse, 4 bits"] < chosen["mse, 8 bits"] <= chosen["largest"]
drawn

# %% [markdown]
# ## In the model
#
# The claim gives the inputs of all block linears static grids, in each of the five ways and with 8 to 4 bits.

# %%
claim = cal.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# With 8 bits there is room for the outliers; cutting them off can only lose. With 4 bits the limit decides. The
# entropy, which knows only counts and not how far a clipped value is moved, cuts more than our model can bear.

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
drawn, axes = figure(height=2)
axes.barh("in steps", steps * tokens * channels / 1e6, color=COLOURS["baseline"])
axes.barh("one pass", kernel.llama_case(tokens, channels).bytes / 1e6, color=COLOURS["method"])
axes.set(xlabel="megabytes for 4096 tokens of 4096 channels")
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
# ```
# python -m chapters exercise calibration --to my
# python -m pytest --submission my tests/quantization/test_calibration.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["calibration"]):
    print(f"{exercise.points} points  {exercise.function}")
