# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Magnitude pruning: the smallest weights go first
#
# To write one token, a language model reads all of its weights, and every one of them must be kept somewhere. Most are
# close to zero, and one that is close to zero adds little to any sum. So set the smallest to zero and do not store
# them. The oldest way to prune is still the first to try, and it leaves three questions: how many, compared with which
# others, and when?
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import copy

import numpy as np
import torch

from chapters import claims, workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.pruning import magnitude
from chapters.shared import pruned_layers
from kernels import bench, cases, check, hardware
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What there is to drop
#
# The magnitudes |w| of the weights of one layer, and their median, the value below which half of them lie. This half of
# the weights holds far less than half of all magnitude.

# %%
name = "blocks.1.attention.q_proj"
weight = lab.weights[f"{name}.weight"].numpy()
size, half = np.abs(weight), np.median(np.abs(weight))
drawn, axes = figure(height=2.8)
axes.hist(size.ravel(), bins=80, color=COLOURS["method"])
axes.axvline(half, color=COLOURS["reference"], linestyle="--")
held = size[size < half].sum() / size.sum()
assert held < 0.3
axes.set(xlabel="|weight| (dashed: the median)", ylabel="weights", title=f"the lower half holds {held:.0%} of the sum")
drawn

# %% [markdown]
# ## What hurts
#
# Now drop the smallest weights of every layer, and train nothing afterwards. Before you look: how many may go until the
# model is twice as perplexed as it was? In a live notebook you can turn the knob. The picture is a corner of that
# layer, grey where a weight was dropped.


# %%
def pruned_corner(zeros=60):
    model = lab.model()
    magnitude.prune_model(model, zeros / 100)
    corner = surgery.linears(model)[name].weight.detach().numpy()[:16, :48]
    drawn, axes = figure(height=2.6)
    heatmap(axes, np.where(corner == 0, np.nan, corner), "weight", limit=0.2)
    cost = f"perplexity {lab.perplexity(model):.0f}, dense {lab.base_perplexity:.0f}"
    axes.set(xlabel="input", ylabel="output", title=f"{zeros}% zeros: {cost}")
    return drawn


# %% [markdown]
# A third of the weights can go and hardly anybody notices. Somewhere past one half the model breaks, and at 80% it is
# gone.

# %%
explore(pruned_corner, zeros=(0, 90, 10))

# %% [markdown]
# ## How many: an exact count
#
# `keep_largest` sorts and keeps exactly as many as it is told. That sounds like nothing, but published codes disagree.
# If the threshold is an element of the sorted list, comparing with > or with ≥ drops one too many or one too few; and
# where weights are equal, as after quantization, no threshold can keep an exact number. Of these 8 weights, 4 are to
# stay.

# %%
row = np.array([0.3, -0.1, 0.2, -0.2, 0.2, 0.0, -0.4, 0.2])
ordered = np.sort(np.abs(row))
ways = {
    "|w| > sorted[4]": np.abs(row) > ordered[4],
    "|w| ≥ sorted[4]": np.abs(row) >= ordered[4],
    "keep_largest": magnitude.keep_largest(row, 4),
}
for rule, mask in ways.items():
    print(f"{rule:16} keeps {mask.sum()}: {row[mask]}")
assert [mask.sum() for mask in ways.values()] == [2, 6, 4]

# %% [markdown]
# Of equal magnitudes the first stay. That is a rule that a kernel can follow, so its masks can be compared bit for bit.
# What cannot be served is refused: a share of 1 would leave nothing, and a NaN is neither large nor small.

# %%
for bad, share in ((row, 1.0), (row, float("nan")), (np.array([1.0, np.nan]), 0.5)):
    try:
        magnitude.layer_mask(bad, share)
    except ValueError as error:
        print(error)
assert ways["keep_largest"].nonzero()[0].tolist() == [0, 2, 3, 6]

# %% [markdown]
# ## Compared with which others
#
# With the weights of the same layer, or of the same row: then all lose the same share. Or with all weights of the
# model: then layers whose weights are small lose more. Here is what one threshold takes from each layer when half of
# all weights go: a row for each block, and a column for each of its seven matrices (q, k, v and o belong to attention).

# %%
masks = magnitude.find_masks(lab.model(), 0.5, "global")
share = [100 * (1 - mask.float().mean().item()) for mask in masks.values()]
assert min(share) < 45 and max(share) > 55
kinds = [layer.split(".")[-1].removesuffix("_proj") for layer in masks][:7]
drawn, axes = figure(width=5.6, height=2.6)
heatmap(axes, np.reshape(share, (-1, 7)), "zeros (%)", limit=100, digits=0)
axes.set(ylabel="block", title="one threshold is unequal treatment")
axes.set_xticks(range(7), kinds)
drawn

# %% [markdown]
# Which is better for the model, a threshold for each layer or one for all? Make a guess. Then prune all linear layers
# of its blocks at once, train nothing, measure.

# %%
sparsities = (0.2, 0.4, 0.6)
costs = magnitude.in_one_shot(lab, sparsities)

# %% [markdown]
# The first zeros cost almost nothing. Then the curve turns upwards, and soon there is no model left. One threshold for
# all is the better choice while perplexity is still worth having. Further on it may empty a layer that the others need,
# and then it is the worse one: magnitudes of different layers are not on one scale.

# %%
drawn, axes = figure()
words = {"layer": ("baseline", "a threshold for each layer"), "global": ("method", "one threshold for all")}
for scope, (role, label) in words.items():
    axes.plot([100 * s for s in sparsities], costs[scope], **series(role), label=label)
axes.axhline(lab.base_perplexity, **series("reference"), label="dense")
axes.set(xlabel="zeros (%)", ylabel="perplexity", yscale="log", title="cheap at first, ruinous soon after")
legend(axes)
assert all(lab.base_perplexity * 0.98 < values[0] < values[1] < values[2] for values in costs.values())
drawn

# %% [markdown]
# ## What is saved
#
# Where zeros may stand anywhere, a bitmap says where: one bit for each weight, and beside it the values that stay. Here
# are a corner of the layer, its bitmap (black where a weight stays), and the values, each row pushed together.

# %%
mask = magnitude.layer_mask(weight, 0.5)
pruned = np.where(mask, weight, 0)
corner, packed = np.where(mask, weight, np.nan)[:12, :20], np.full((12, 20), np.nan)
for line, stays in zip(packed, corner, strict=True):
    line[: np.isfinite(stays).sum()] = stays[np.isfinite(stays)]
drawn, axes = panels(3, width=8.4, height=2.2)
heatmap(axes[0], corner, "weight")
axes[1].imshow(mask[:12, :20], cmap="Greys", interpolation="nearest", aspect="auto")
heatmap(axes[2], packed, "weight")

# %% [markdown]
# (Each picture has as many cells as the corner; what is grey on the right need not be stored.)

# %%
for place, title in zip(axes, ("zeros grey", "bitmap", "values"), strict=True):
    place.set(title=title, xticks=[], yticks=[])
assert np.array_equal(pruned[mask], weight[mask])
drawn

# %% [markdown]
# `SparseLinear` holds these two and nothing else. In 16 bits, half zeros are 1 + 16 / 2 = 9 bits a weight, not 16.
# It multiplies by the expanded weight: zeros that stand anywhere save memory, not time. (Zeros that stand where
# hardware can skip them are the subject of the chapter on N:M sparsity.)

# %%
model = lab.model().half()
magnitude.prune_model(model, 0.5)
sparse = pruned_layers.use_sparse(copy.deepcopy(model))
assert pruned_layers.stored_bits(sparse.modules()) == 9
for title, bits in (("dense", 16), ("sparse", pruned_layers.stored_bits(sparse.modules()))):
    print(f"{title}: {bits} bits a weight")

# %% [markdown]
# ## When: all at once, in rounds, or gradually
#
# After pruning one trains on, with the dropped weights held at zero, so that the others take over what is lost. It may
# help to drop them in between. Han et al. prune in rounds, each of which takes the same share of what is left. Zhu and
# Gupta prune every few steps by a cubic curve: fast while there is much to drop that nobody needs, slow at the end.

# %%
drawn, axes = figure(height=3.0)
for kind, role in zip(magnitude.SCHEDULES, ("baseline", "method", "second"), strict=True):
    schedule = magnitude.SCHEDULES[kind](0.9, 300) | {300: 0.9}
    line = axes.plot([*schedule], [100 * s for s in schedule.values()], **series(role), label=kind)[0]
    line.set(marker="", drawstyle="steps-post")
    assert max(schedule.values()) == 0.9
axes.set(xlabel="training step", ylabel="zeros (%)", title="three ways to reach 90% zeros")
legend(axes)
drawn

# %% [markdown]
# The masks are found anew at each step of the schedule, from the weights as they then are. Since a dropped weight is
# zero, it is never found among the largest again. A short run shows it: the zeros only become more.

# %%
model = lab.model()
schedule = {0: 0.2, 4: 0.5, 8: 0.8}
last = magnitude.prune_in_training(
    model, lab.train_stream, magnitude.training(model, lab.train_stream, 10, 0), schedule
)
kept, weights = pruned_layers.count_kept(last)
zeros = sum(int((layer.weight == 0).sum()) for layer in surgery.linears(model).values())
print(f"{kept} of {weights} weights stay")
assert zeros == weights - kept and abs(zeros / weights - 0.8) < 1e-4

# %% [markdown]
# Is gradual better than at once, if both train equally long? What do you expect? The recorded measurement, three seeds:
# it is better where very many weights go. Where fewer go, what was dropped at once is soon repaired, and a schedule
# that drops until 7/10 of the run only leaves less time for it. That is worth knowing before one builds a schedule.
# (Records are measured on more text than the figures above, so even the dense model has another perplexity there.)

# %%
record = claims.recorded("magnitude")
print(record["sentence"])
trained = {key: value for key, value in record["numbers"].items() if key.startswith("trained")}
drawn, axes = figure(height=2.6)
axes.barh(list(trained), list(trained.values()), color=[COLOURS["baseline"], COLOURS["method"]] * 2)
axes.axvline(record["numbers"]["perplexity, dense"], color=COLOURS["reference"], linestyle="--")
axes.set(xlabel="perplexity (dashed: dense)", title="gradual wins at 90% zeros, not at 80%")
assert trained["trained, cubic, 90%"] < trained["trained, one-shot, 90%"]
axes.invert_yaxis()
drawn

# %% [markdown]
# ## The kernel's idea: select, do not sort
#
# Sorting a layer to find one number is a waste. A float's bits without the sign, read as an integer, order as its
# magnitude does. So the threshold can be found bit by bit, from the highest: set the bit if enough keys still reach
# the number. 15 questions for a 16-bit number, each a comparison and a sum.

# %%
half_precision = weight[0].astype(np.float16)
keys = (half_precision.view(np.int16) & 0x7FFF).astype(int)
found, kept = 0, keys.size // 2
for bit in reversed(range(15)):
    if (keys >= found | 1 << bit).sum() >= kept:
        found |= 1 << bit
threshold = np.uint16(found).view(np.float16)
print(f"key {found:015b} is {threshold:.4f}")
assert threshold == np.sort(np.abs(half_precision))[-kept]

# %% [markdown]
# A row fits the registers of one program: it is read once, asked 15 questions, and written. A layer does not fit, so it
# is read twice at least, once to find the threshold and once to apply it. To need no third read the kernel guesses:
# a small sample tells about where the threshold is, and the one read counts, for each of the keys around there, how
# often it occurs. Here are the counters of a window of 256 keys around the guess.

# %%
flat = weight.ravel().astype(np.float16)
keys = (flat.view(np.int16) & 0x7FFF).astype(int)
guess = int(np.median(keys[:: keys.size // 512]))
counters = np.bincount(np.clip(keys - guess + 128, -1, 256) + 1, minlength=258)
reached = keys.size - np.cumsum(counters)[:-1]  # keys from each counter of the window on
place = int((reached[:256] >= keys.size // 2).sum()) - 1
exact = np.sort(keys)[keys.size - keys.size // 2]
assert 0 <= place < 256 and guess - 128 + place == exact

# %% [markdown]
# The dashed line is the key of the exact threshold. If it were outside, the counters would show that too, and the
# kernel would count again by digits. The result is the same; a wrong guess only costs time.

# %%
drawn, axes = figure(height=2.6)
axes.bar(np.arange(256) + guess - 128, counters[1:257], width=1.0, color=COLOURS["method"])
axes.axvline(exact, color=COLOURS["reference"], linestyle="--")
axes.set(xlabel="key (dashed: the threshold's)", ylabel="weights", title="the guess was near enough")
drawn

# %% [markdown]
# Bytes, for a layer of Llama-7B in bfloat16: rows are read and written once; a layer is read twice and written once.
# Below them what an H200 needs at the least, at its 4.8 TB/s.

# %%
for case in cases.cases("pruning.magnitude"):
    floor = 1e6 * case.bytes / hardware.GPUS["H200"].bandwidth
    print(f"{case.name:22} {case.bytes / 1e6:6.1f} MB, at least {floor:.1f} µs")
by_name = {case.name: case.bytes for case in cases.cases("pruning.magnitude")}
assert by_name["rows N=4096 K=4096"] == 2 * 2 * 4096**2 and by_name["layer N=4096 K=4096"] == 3 * 2 * 4096**2

# %% [markdown]
# Whether it loads 128 bits at a time and keeps all in registers can be seen without a GPU, in the machine code that the
# compiler makes for one (an H100 or H200, sm_90).

# %%
report = check.static_report("pruning.magnitude", [90])
for line in {(line["case"], line["kernel"]): line for line in report}.values():
    print(f"{line['case']:22} {line['kernel']:13} {line['registers']:3} registers, {line['load_bits']}-bit loads, "
          f"{line['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(line["failures"] for line in report)

# %% [markdown]
# And timed on a GPU, beside torch's own selections:

# %%
for line in bench.recorded("pruning.magnitude"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in line.get("peers_us", {}).items())
    print(f"{line['gpu']}, {line['case']}: {line.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("pruning.magnitude"):
    print("not recorded yet: python -m kernels bench magnitude, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: two functions that choose, two schedules, and two of the kernel.
#
# ```
# python -m chapters exercise magnitude --to my
# python -m pytest --submission my tests/pruning/test_magnitude.py
# ```
#
# And to prune a model of your own:
#
# ```
# python -m chapters run magnitude --model PATH --sparsity 0.5 --save pruned
# python -m minitfm generate --model pruned
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["magnitude"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["magnitude"])) == 6
