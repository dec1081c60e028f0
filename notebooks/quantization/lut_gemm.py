# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # LUT-GEMM: weights as sums of signs
#
# A grid of evenly spaced values is easy to compute with, but weights are not evenly spread: most lie near zero, a few
# far out. With 4 or 8 values to give away, where they lie matters. Binary-coding quantization (BCQ) writes a weight as
# ± a₁ ± a₂ …, with scales that a group of weights shares. Two scales make four values, three make eight, and they need
# not be evenly spaced. What is stored for each weight is signs, a bit each.
#
# LUT-GEMM is the product with such weights. It needs no multiplications by weights, and its authors replace even the
# additions by looking up sums that were made before.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import lut_gemm
from chapters.quantization.gptq import round_to_nearest
from kernels import bench, check, hardware
from kernels.quantization import lut_gemm as kernel

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Here are the 128 weights of one group of our model, and the four values that a uniform 2-bit grid has for them. The
# grid must reach the ends, so most weights, which lie around zero, get one or two values to share.

# %%
weight = lab.weights["blocks.1.feed_forward.up_proj.weight"].numpy().astype(float)
grid = round_to_nearest(weight, 2, 128)
coded = lut_gemm.alternating(weight, 2, 128)
row = 5

# %% [markdown]
# Four values each: evenly spaced ones above, and below them those of BCQ, which we shall find further below. Turn the
# planes (a plane is one sign for every weight, so one bit) where the notebook is live: the more values, the less does
# it matter where they lie.


# %%
def values_of_a_group(planes=2):
    drawn, axes = figure(height=3.0)
    tallest = axes.hist(weight[row], bins=30, color=COLOURS["muted"])[0].max()
    two = round_to_nearest(weight, planes, 128), lut_gemm.alternating(weight, planes, 128)
    for held, words, role, up in zip(two, ("uniform", "BCQ"), ("baseline", "method"), (1.3, 1.1), strict=True):
        values = np.unique(held.dequantize()[row])
        axes.plot(values, np.full(len(values), up * tallest), **series(role) | {"linestyle": ""}, label=words)
    axes.set(xlabel="weight", ylabel="weights of a group", title=f"{2**planes} values for 128 weights")
    legend(axes, loc="center right")
    return drawn


# %% [markdown]
# The uniform grid spends a value on an end where hardly a weight is. BCQ's values stand closer.

# %%
explore(values_of_a_group, planes=(1, 4))

# %% [markdown]
# With two scales the four values are ± large ± small, mirrored around zero. They leave less squared error.

# %%
large, small = coded.alpha[row, 0]
values = sorted([large + small, large - small, small - large, -large - small])
np.testing.assert_allclose(np.unique(coded.dequantize()[row]), values)
lost = [np.square(held.dequantize() - weight).sum() for held in (grid, coded)]
assert lost[1] < lost[0]

# %% [markdown]
# ## Greedy
#
# The first plane takes the signs of the weights. For given signs the best single scale is the mean of their sizes.
# What is left over gets the second plane in the same way, and so on. Here are six weights of that row, their signs in
# three planes, and what the planes leave over.

# %%
first = lut_gemm.greedy(weight, 3, 128)
signs, alpha = first.signs[row, :6].astype(float), first.alpha[row, 0]
left = weight[row, :6, None] - np.cumsum(signs * alpha, axis=1)
drawn, axes = panels(3, width=8.8, height=2.6)
heatmap(axes[0], weight[row, :6, None], "weight", digits=2)
heatmap(axes[1], signs, "sign", digits=0)
heatmap(axes[2], left, "left over after the plane", digits=2)
for axis, words in zip(axes, ("", "plane", "plane"), strict=True):
    axis.set(xlabel=words, ylabel="column")
drawn

# %% [markdown]
# The scales come sorted: each plane repairs what the ones before it left.

# %%
assert alpha[0] > alpha[1] > alpha[2]
np.testing.assert_allclose(alpha[0], np.abs(weight[row]).mean())

# %% [markdown]
# ## Alternating
#
# Greedy never looks back. `refine` does: for the signs at hand, the best scales are a least-squares problem with as
# many unknowns as planes; for these scales, each weight then takes the nearest of the sums. Neither step can make the
# error larger, so it falls, round after round, until nothing moves. (The claim below draws it for the whole model.)

# %%
states = list(lut_gemm.rounds_of(weight, 3, 128, 15))
errors = [np.square(state.dequantize() - weight).mean() for state in states]
assert (np.diff(errors) <= 1e-12).all() and errors[-1] < errors[0]

# %% [markdown]
# A weight that lies halfway between two sums takes the upper one, and the scales are kept positive and sorted, largest
# first. With the signs of the released code to start from, both rules give its signs exactly.

# %%
found = lut_gemm.nearest_signs(np.array([-2.0, 0.0, 2.0]), np.array([2.0, 1.0]))
print(found.tolist())
assert (found @ [2, 1]).tolist() == [-1, 1, 3]

# %% [markdown]
# ## A uniform grid is BCQ, too
#
# A 3-bit code is 4 c₂ + 2 c₁ + c₀ with bits 0 or 1, and a bit is half of its sign and one half. So scales s/2, s, 2s
# and an offset give the same values, and one kernel serves both formats. It also gives alternating another start: from
# the uniform grid, whose error it can then only lower.

# %%
grid = round_to_nearest(weight, 4, 128)
same = lut_gemm.from_uniform(grid)
np.testing.assert_allclose(same.dequantize(), grid.dequantize(), atol=1e-12)
np.testing.assert_allclose(same.alpha[0, 0] / grid.scale[0, 0], [4, 2, 1, 0.5])
better = same
for _ in range(5):
    better = lut_gemm.refine(weight, better)
squares = [np.square(each.dequantize() - weight).sum() for each in (grid, better)]
assert squares[1] <= squares[0]

# %% [markdown]
# ## The product by look-up
#
# Eight activations have 256 signed sums. `sign_sums` makes them all, once; a byte of eight signs is then the address of
# the answer. All rows and all planes use the same tables. Here are the sums of one table, the first 64 in the order of
# their keys: each bit of the key flips one activation.

# %%
x = np.random.default_rng(0).normal(size=(1, weight.shape[1]))
tables = lut_gemm.sign_sums(x)
drawn, axes = figure(height=2.3)
axes.plot(tables[0, 0, :64], color=COLOURS["method"], linewidth=1)
axes.set(xlabel="key: eight signs as a byte", ylabel="signed sum", title="one table: sums made once, looked up often")
assert tables.shape == (1, weight.shape[1] // 8, 256) and np.allclose(tables, -tables[..., ::-1])
drawn

# %% [markdown]
# The packed bits, read as bytes, are the keys. The sums that they find are scaled by group and plane, and that is all.

# %%
packed = lut_gemm.pack(coded.signs)
y = lut_gemm.lut_gemm(x, packed, coded.alpha, None, 128)
np.testing.assert_allclose(y, x @ coded.dequantize().T, atol=1e-10)
rows, columns = weight.shape
lookups, multiplications = 2 * rows * columns // 8, rows * columns
print(f"{lookups} look-ups for {multiplications} multiply-adds, and {2 * tables.size} additions for the tables")
assert lut_gemm.keys(packed).size == lookups < multiplications

# %% [markdown]
# ## In the model
#
# The claim codes all linear layers of all blocks, greedily and with 15 rounds, and puts a uniform grid with groups of
# the same size beside them. (At the same size, BCQ stores a scale per plane, and a uniform grid one and a zero point.)
# Values that may lie anywhere can only be better than evenly spaced ones, or can they?

# %%
claim = lut_gemm.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Alternating always pays: greedy wastes what more planes could bring. Against the uniform grid, free values pay most
# where there are few of them. With 4 bits there is little left to win: sixteen evenly spaced values are already dense,
# and the greedy start leads alternating into a local optimum that may be worse than a plain grid. The thin lines on the
# left tell.

# %%
assert claim.holds
ratio = {}
for bits in (2, 3, 4):
    lost = {method: claim.numbers[f"error, {method}, {bits} bits"] for method in lut_gemm.METHODS}
    assert lost["alternating"] < lost["greedy"]
    ratio[bits] = lost["alternating"] / lost["uniform"]
assert ratio[2] < ratio[3] < ratio[4]

# %% [markdown]
# ## The kernel, in bytes
#
# A plane is one bit per weight, so time could fall with every plane left out. Here is the least time that the bytes
# take on an H200, for one token and a 4096 × 4096 layer (in bfloat16, 33.6 MB).

# %%
gpu, planes = hardware.GPUS["H200"], [1, 2, 3, 4]
floors = [1e6 * hardware.floor_seconds(kernel.llama_case(4096, 4096, count), gpu) for count in planes]
dense = 1e6 * 2 * (4096 * 4096 + 2 * 4096) / gpu.bandwidth
drawn, axes = figure(height=2.2)
axes.barh(["1 plane", "2 planes", "3 planes", "4 planes", "bfloat16"], [*floors, dense], color=COLOURS["method"])
axes.set(xlabel="least time, µs (groups of 128)", title="every plane left out saves its bytes")
axes.invert_yaxis()
assert all(dense / floor > 3.4 for floor in floors)
drawn

# %% [markdown]
# The floor is not reached: for each sign a GPU must do something, too, and it has about one instruction to spare for
# it. The authors' tables spend one look-up on eight signs, in shared memory whose banks collide. Our kernel has no
# table: it tests a bit and adds x or does not, two instructions for each sign. The first lines of its file count what
# either costs. What the compiler makes of it (for sm_90, an H100 or H200):

# %%
report = check.static_report("quantization.lut_gemm", [90])
for line in report:
    print(f"{line['case']:34} {line['registers']:3} registers, {line['load_bits']}-bit loads, "
          f"{line['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(line["failures"] for line in report)

# %% [markdown]
# And timed on a GPU, beside cuBLAS on the dense weight:

# %%
for timed in bench.recorded("quantization.lut_gemm"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in timed.get("peers_us", {}).items())
    print(f"{timed['gpu']}, {timed['case']}: {timed.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.lut_gemm"):
    print("not recorded yet: python -m kernels bench quantization.lut_gemm, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: greedy, the nearest signs, a round of alternating, the product by look-up, and the
# kernel.
#
# ```
# python -m chapters exercise lut_gemm --to my
# python -m pytest --submission my tests/quantization/test_lut_gemm.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["lut_gemm"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["lut_gemm"])) == 5
