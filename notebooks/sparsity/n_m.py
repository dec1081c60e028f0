# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # N:M sparsity: zeros that hardware can skip
#
# To write one token, a model reads all of its weights. If half of them were zero, and we knew which, half of the
# reading could be saved. Two questions follow: which weights may become zero without hurting the model, and how to
# say where the others stand without spending what was saved?
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, panels
from chapters.lab import Lab
from chapters.shared.pruned_layers import prune_each
from chapters.sparsity import n_m
from kernels import bench, cases, check, hardware
from minitfm import surgery

lab = Lab()

# %% [markdown]
# ## What there is to drop
#
# Sort the weights of one layer by magnitude and add them up, smallest first. If a weight matters as much as it is
# large, the lower half of them matters little: it holds less than a quarter of the whole.

# %%
weight = lab.weights["blocks.0.feed_forward.up_proj.weight"].numpy()
ordered = np.sort(np.abs(weight), axis=None)
held = np.cumsum(ordered) / ordered.sum()
half = held[held.size // 2]
assert half < 0.25
drawn, axes = figure(height=2.8)
axes.plot(np.linspace(0, 100, held.size), 100 * held, color=COLOURS["method"])
axes.plot([50, 50, 0], [0, 100 * half, 100 * half], color=COLOURS["reference"], linestyle="--")
axes.set(xlabel="weights, smallest first (%)", ylabel="share of all magnitude (%)", xlim=(0, 100), ylim=(0, 100))
drawn

# %% [markdown]
# ## Three ways to drop half
#
# Here is the same corner of that layer three times, dark where a weight stays. Each drops half of the weights. Which
# will hurt the model least, and which most?
#
# - **Unstructured**: the smaller half goes, wherever it stands. The best choice of weights, and the worst for
#   hardware: every survivor needs an address, and rows become unequally long.
# - **4-row blocks**: four rows share their zeros. Simple to skip, but four weights now stand or fall together.
# - **2:4**: two of every four neighbours in a row stay. Each group keeps the same number, so nothing is unequal, and
#   a position among four is only 2 bits.

# %%
masks = {name: rule(weight) for name, rule in n_m.rules(0.5, (2, 4)).items()}
assert all(mask.mean() == 0.5 for mask in masks.values())
drawn, axes = panels(3, width=8.0, height=3.0)
for place, (name, mask) in zip(axes, masks.items(), strict=True):
    place.imshow(mask[:32, :32], cmap="Greys", interpolation="nearest")
    place.set(title=name, xlabel="input", ylabel="output", xticks=[], yticks=[])
drawn

# %% [markdown]
# How much magnitude survives? The freest pattern must keep the most, since it keeps the largest weights there are. In
# this layer 2:4 lies between the others; where whole rows are weak, blocks can keep as much as 2:4. But magnitude is
# only a stand-in for what we care about, as the model will show below.

# %%
kept = [np.abs(weight[mask]).sum() / np.abs(weight).sum() for mask in masks.values()]
assert kept[0] > kept[1] > kept[2]
drawn, axes = figure(height=1.9)
axes.barh(list(masks), 100 * np.array(kept), color=COLOURS["method"])
axes.set(xlabel="magnitude that stays (%)", xlim=(0, 100), title="the freer, the more stays")
axes.invert_yaxis()
drawn

# %% [markdown]
# ## The rule
#
# `n_m_mask` sorts each group by magnitude and keeps the first n. Note what it does with equals: the sort is stable, so
# the lowest index stays. And note that N counts what is *kept*; some papers and code bases count the zeros, which is
# the same for 2:4 but not for 1:4. Below, the second group of four holds a 0.5 four times (once as −0.5), of which the
# first two stay.

# %%
row = np.array([[0.1, -0.9, 0.3, 0.2, 0.5, -0.5, 0.5, 0.5]])
two_of_four, one_of_four = n_m.n_m_mask(row), n_m.n_m_mask(row, 1, 4)
assert two_of_four.tolist() == [[False, True, True, False, True, True, False, False]]
assert one_of_four.tolist() == [[False, True, False, False, True, False, False, False]]

# %% [markdown]
# ## The compressed form
#
# What stays of a group are two values and two positions. A position takes 2 bits, so a group takes one hexadecimal
# digit, and four groups fill a 16-bit word. This is, but for the order of the words, torch's semi-structured format.
#
# By hand, for one word. The first group below keeps 3 at position 1 and −1 at position 3. Its digit is the lower
# position plus four times the higher: 1 + 4 · 3 = 13, hexadecimal d. The others: 0 + 4 · 3 = c, 2 + 4 · 3 = e and
# 0 + 4 · 1 = 4. The first group takes the lowest bits, so the word reads from right to left: 4ecd.

# %%
by_hand = np.array([[0, 3, 0, -1, 5, 0, 0, 2, 0, 0, 4, 1, 7, 6, 0, 0]], dtype=np.float16)
numbers, words = n_m.compress(by_hand)
print(numbers[0], f"{words[0, 0]:04x}")
assert numbers[0].tolist() == [3, -1, 5, 2, 4, 1, 7, 6]
assert words[0, 0] == 0x4ECD == 13 + 12 * 16 + 14 * 16**2 + 4 * 16**3

# %% [markdown]
# Now the layer. Count the bytes in 16 bits: half of the values, and 1/8 more of that for the positions. Nine
# sixteenths.

# %%
pruned = np.where(n_m.n_m_mask(weight), weight, 0).astype(np.float16)
values, metadata = n_m.compress(pruned)
assert values.nbytes * 16 == pruned.nbytes * 8
assert metadata.nbytes * 16 == pruned.nbytes * 1
np.testing.assert_array_equal(n_m.decompress(values, metadata), pruned)

# %% [markdown]
# Drawn: a corner of the layer, then its values pushed together, and the positions that say how to pull them apart
# again. Two neighbouring cells of the third picture belong to one group, and the second is always the higher.

# %%
drawn, axes = panels(3, width=9.0, height=2.6)
positions = n_m.positions(values, metadata).reshape(values.shape)
heatmap(axes[0], np.where(pruned == 0, np.nan, pruned)[:8, :16], "weight")
heatmap(axes[1], values[:8, :8], "value")
heatmap(axes[2], positions[:8, :8], "position in its group", digits=0)
for place, title in zip(axes, ("2:4, zeros grey", "values", "positions"), strict=True):
    place.set(title=title, xticks=[], yticks=[])
assert (positions[:, 0::2] < positions[:, 1::2]).all()
drawn

# %% [markdown]
# A group may hold fewer than two non-zeros. Its free slot then points at the first free of positions 2 and 3: torch's
# convention, which looks odd until one wants equal bits. More than two non-zeros are another matter. torch's
# conversion drops the excess without a word; ours refuses, because a weight that vanishes in a format conversion is
# never found again.

# %%
lone = np.zeros((1, 16))
lone[0, [1, 7]] = 1.0
print([hex(int(n_m.compress(lone)[1][0, 0]) >> 4 * group & 15) for group in range(4)])
try:
    n_m.compress(np.ones((1, 16)))
except ValueError as error:
    print(error)

# %% [markdown]
# torch keeps the words in the order that CUTLASS, the library behind its kernels, wants (`to_cutlass` converts). Rows
# 8 apart become neighbours, and in each 2 × 2 block the two words off the diagonal trade places. Here the word of row
# 8, column 1 is called 81; left are four rows as we store them, right how the same eight words follow in memory.

# %%
named = (10 * np.arange(32)[:, None] + np.arange(2)).astype(np.int16)
reordered = n_m.to_cutlass(named).ravel()[:8].reshape(4, 2)
drawn, axes = panels(2, width=6.4, height=2.4)
for place, order, title in zip(axes, (named[::8], reordered), ("row-major", "CUTLASS's order"), strict=True):
    heatmap(place, order, "10 · row + column", digits=0)
    place.set(title=title, xticks=[], yticks=[])
assert reordered.tolist() == [[0, 80], [1, 81], [160, 240], [161, 241]]
drawn

# %% [markdown]
# ## The product
#
# A row's positions say which activations it needs, and it multiplies just those: half of the multiplications are gone
# together with the bytes.

# %%
x = np.random.default_rng(0).normal(size=(3, weight.shape[1]))
exact = values.astype(np.float64)
np.testing.assert_allclose(n_m.sparse_matmul(x, exact, metadata), x @ n_m.decompress(exact, metadata).T, atol=1e-12)

# %% [markdown]
# ## Any N of any M
#
# Nothing of this hangs on 2:4. `compress_n_m` keeps, for each value, its position in ⌈log2 M⌉ bits, packed without
# gaps. With values of 16 bits that makes N / M · (16 + ⌈log2 M⌉) bits a weight. Counted:

# %%
for n, m in ((1, 4), (2, 8), (4, 16), (1, 2), (2, 4), (4, 8), (8, 16)):
    sparse = np.where(n_m.n_m_mask(weight, n, m), weight, 0).astype(np.float16)
    parts = n_m.compress_n_m(sparse, n, m)
    np.testing.assert_array_equal(n_m.decompress_n_m(*parts, n, m), sparse)
    bits = [8 * part.nbytes / sparse.size for part in parts]
    print(f"{n}:{m}  {bits[0]:4.1f} bits of values and {bits[1]:5.3f} of positions a weight")
    assert sum(bits) == n / m * (16 + (m - 1).bit_length())

# %% [markdown]
# Longer groups are freer, and freedom has a price. In a live notebook, choose a pattern: with half of the weights,
# what does each doubling of M gain, and what does it cost?


# %%
def pattern_of(pattern="4:8"):
    n, m = map(int, pattern.split(":"))
    stays = n_m.n_m_mask(weight, n, m)
    share, bits = np.abs(weight[stays]).sum() / np.abs(weight).sum(), n / m * (16 + (m - 1).bit_length())
    drawn, axes = figure(height=2.0)
    axes.imshow(stays[:16, :64], cmap="Greys", interpolation="nearest", aspect="auto")
    axes.set(xlabel="input", ylabel="output", xticks=[], yticks=[])
    axes.set_title(f"{pattern}: {share:.1%} of the magnitude, {bits} bits a weight")
    return drawn


explore(pattern_of, pattern=["1:2", "2:4", "4:8", "8:16", "16:32", "1:4", "2:8", "4:16"])

# %% [markdown]
# ## What it costs the model
#
# Now prune all linear layers of all blocks at once, with no training afterwards, and measure perplexity on text that
# the model has never seen. At 25% zeros, and at 50%: each pattern between the freest and the most regular.

# %%
sweep = {0.25: n_m.rules(0.25, (6, 8), (3, 4)), 0.5: n_m.rules(0.5, (4, 8), (2, 4))}
found = {share: [n_m.perplexities(lab, rule)[0] for rule in rules.values()] for share, rules in sweep.items()}

# %% [markdown]
# The dashed line is the dense model. The scale is logarithmic, or the blocks would hide the rest.

# %%
drawn, axes = panels(2, width=8.4, height=2.8)
for place, (share, rules) in zip(axes, sweep.items(), strict=True):
    place.barh(list(rules), found[share], color=COLOURS["method"])
    place.axvline(lab.base_perplexity, color=COLOURS["reference"], linestyle="--")
    place.set(title=f"{share:.0%} zeros", xlabel="perplexity (dashed: dense)", xscale="log")
    place.invert_yaxis()
    assert lab.base_perplexity < found[share][0] and found[share] == sorted(found[share])
drawn

# %% [markdown]
# The order is the same at both shares: the freer the pattern, the better the model. Eight neighbours with four kept
# are freer than four with two, and lie nearer to unstructured. Blocks are in another class. At 75% zeros no pattern
# leaves a model that speaks, so the order there means nothing. Mishra et al. train on with the mask in place, and
# report that 2:4 then costs nearly nothing.
#
# ## In the model
#
# `SparseLinear` holds the compressed weight and nothing else. On a GPU it calls the kernel; here it expands the weight
# for each call and computes exactly what the pruned layer does. With all layers compressed, the model writes what the
# pruned one writes, to the last bit.

# %%
model = lab.model()
prune_each(model, n_m.n_m_mask)
with torch.no_grad():
    expected = model(lab.validation[:2])
    n_m.compress_model(model)
    assert torch.equal(model(lab.validation[:2]), expected)
assert not surgery.linears(model)

# %% [markdown]
# ## The kernel, in bytes
#
# Decoding one token waits for memory, so bytes are time. For a 4096 × 4096 layer of Llama-7B in bfloat16: dense, what
# the kernel reads (values, positions, inputs and outputs), and how long an H200 needs for each at its 4.8 TB/s. No
# kernel can gain more than the ratio of the two, which is just below 16/9.

# %%
case = cases.cases("sparsity.n_m")[0]
dense = 2 * 4096 * 4096 + 2 * (4096 + 4096)
for name, size in (("dense", dense), ("compressed", case.bytes)):
    print(f"{name}: {size / 1e6:.1f} MB, at least {1e6 * size / hardware.GPUS['H200'].bandwidth:.1f} µs")
assert 1.77 < dense / case.bytes < 1.78

# %% [markdown]
# ## The kernel's idea
#
# Values and activations must meet, and there are two ways. For one token the activations come to the values. Reading
# x[position] from memory would be many small loads. So the kernel loads x as it lies, and takes four 16-bit activations
# as one 64-bit word: the activation at position p is 16 · p bits up, one shift away, in a register.

# %%
nibble = 0xD  # positions 1 and 3, as in the first group above
activations = np.array([0.5, 2.0, -4.0, 8.0], dtype=np.float16)
group = int(activations.view(np.uint64)[0])
found = [group >> 16 * (nibble & 3) & 0xFFFF, group >> 16 * (nibble >> 2) & 0xFFFF]
gathered = np.array(found, dtype=np.uint16).view(np.float16)
print(f"{group:016x}", gathered)
assert gathered.tolist() == [2, 8] and gathered @ by_hand[0, [1, 3]] == activations @ by_hand[0, :4]

# %% [markdown]
# (For other patterns than 2:4 the kernel does gather x[position]: eight positions fit no 64-bit word. A warp's gather
# falls on few neighbouring activations, which the first-level cache holds.)
#
# Several tokens would each have to be gathered. Then it is cheaper that the values go to the activations: the same
# shifts, the other way, put each value into its slot of a 64-bit word of zeros. That is the dense group, made once for
# all tokens, and tensor cores multiply it. Half of their products are by zero: no operation is saved, so a long prompt,
# which waits for operations, is no faster. The bytes are saved all the same.

# %%
lower, higher = (int(bits) for bits in numbers[0, :2].view(np.uint16))
expanded = lower << 16 * (nibble & 3) | higher << 16 * (nibble >> 2)
group = np.array([expanded], dtype=np.uint64).view(np.float16)
print(f"{expanded:016x}", group)
assert group.tolist() == by_hand[0, :4].tolist()

# %% [markdown]
# A kernel can still be slower than its bytes: if it spills registers, loads in small pieces or cannot fill the
# machine. That much can be seen without a GPU, in the machine code that the compiler makes for one (here sm_90).

# %%
report = check.static_report("sparsity.n_m", [90])
for row in report:
    print(f"{row['case']:28} {row['kernel']:16} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside cuBLAS on the dense weight and torch's own semi-structured product:

# %%
for row in bench.recorded("sparsity.n_m"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("sparsity.n_m"):
    print("not recorded yet: python -m kernels bench sparsity.n_m, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: six functions of the reference, one of the format's order, and two of the
# kernel.
#
# ```
# python -m chapters exercise n_m --to my
# python -m pytest --submission my tests/sparsity/test_n_m.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.sparsity
# chapters.sparsity.__path__.insert(0, "../../my/chapters/sparsity")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["n_m"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["n_m"])) == 9
