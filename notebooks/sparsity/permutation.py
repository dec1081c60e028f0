# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Channel permutation: choose who competes with whom
#
# 2:4 keeps two of every four neighbours. Where three large weights happen to be neighbours, one of them goes; where
# four small ones are, two of them stay. But a network does not care in which order its channels stand. So before
# pruning, put them in an order in which large weights do not compete.
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.figures import COLOURS, figure, heatmap, panels
from chapters.lab import Lab
from chapters.shared.channel_sites import Place, Site, reorder, reorder_inputs, sites
from chapters.shared.permutation_measures import draw_mask
from chapters.shared.pruned_layers import prune_each
from chapters.shared.stripes import splits
from chapters.sparsity import permutation
from chapters.sparsity.n_m import n_m_mask
from kernels import bench, cases, check, hardware
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts: three large ones among four
#
# A stripe is four neighbouring columns; within it, each row keeps its two largest weights. Here are two rows and two
# stripes. All large weights stand in the first stripe, and each row loses one of its three. Which columns would you
# move? Put two of the large ones into the other stripe, and none is lost.

# %%
toy = np.array([[9.0, 8, 7, 0, 1, 1, 0, 1], [6.0, 9, 8, 1, 0, 1, 1, 0]])
order = np.array([0, 4, 5, 3, 1, 2, 6, 7])
for words, weight in (("as stored", toy), ("reordered", toy[:, order])):
    print(f"{words}: 2:4 keeps {permutation.kept_magnitude(weight):.0f} of {toy.sum():.0f}")
drawn, axes = panels(2, width=8.0, height=1.6)
for place, (weight, title) in zip(axes, ((toy, "as stored"), (toy[:, order], "reordered")), strict=True):
    heatmap(place, np.where(n_m_mask(weight), weight, np.nan), "weight", digits=0)
    place.set(title=title, yticks=[], xticks=range(8))
assert permutation.kept_magnitude(toy[:, order]) > permutation.kept_magnitude(toy)
drawn

# %% [markdown]
# Grey cells (–) are dropped. Now a layer of the model: what 2:4 drops, darker where the dropped weight is larger, with
# lines between the stripes. On the right after a search, with the same columns in another order. Fewer dark cells, the
# same number of zeros.

# %%
down = lab.weights["blocks.2.feed_forward.down_proj.weight"].double().numpy()
corner = down[:40, :40]
reordered = corner[:, permutation.stripe_groups(corner)]
drawn, axes = panels(2, width=7.6, height=3.6)
draw_mask(axes[0], corner, n_m_mask(corner), "dropped, as stored")
draw_mask(axes[1], reordered, n_m_mask(reordered), "dropped, reordered")
assert permutation.kept_magnitude(reordered) > permutation.kept_magnitude(corner)
drawn

# %% [markdown]
# ## Swaps: one product gives all gains
#
# Take column a out of its stripe and put b in. In each row the largest of the other three stays, and beside it the
# second of them, call it q, or b: whichever is larger. So all that a swap needs is M[a, b], the sum over the rows of
# max(q of a, b). It is a matrix product with max in the place of times, and one such product gives the gains of all
# swaps. Below, dark swaps gain nothing or lose, among them the squares of four on the diagonal, where both columns are
# in the same stripe already. But some pairs are bright.

# %%
gains = permutation.swap_gains(corner)
tried = corner.copy()
tried[:, [3, 17]] = corner[:, [17, 3]]
gained = permutation.kept_magnitude(tried) - permutation.kept_magnitude(corner)
assert np.isclose(gains[3, 17], gained)
drawn, axes = figure(width=4.6, height=3.4)
heatmap(axes, np.maximum(gains, 0), "magnitude gained")
axes.set(xlabel="column", ylabel="column", title="what swapping two columns gains")
drawn

# %% [markdown]
# ## Groups of stripes: all ways to share their columns out
#
# A swap moves two columns. Better ones may need several at once: two stripes hold eight columns, and there are 35 ways
# to share these out; three stripes have 5,775. What a stripe keeps does not depend on the others, so one sum over the
# rows for each choice of four columns is enough (70 of eight, 495 of twelve), and each way adds two (three) of them.

# %%
gain, split = permutation.group_gains(corner)
best = int(gain.argmax())
print(f"{len(splits(8))} ways for two stripes, {len(splits(12))} for three")
print(f"best of {len(gain)} pairs: number {best}, shared out as {splits(8)[split[best]].tolist()}")
assert gain.max() >= gains.max() > 0  # a swap is one of the 35
assert splits(8)[0].ravel().tolist() == list(range(8))

# %% [markdown]
# ## Which search finds most
#
# Efficacy counts from what 2:4 keeps as things stand (0%) to what one would keep if each row could choose its half
# freely (100%). Random orders find little: there are too many. Swaps get stuck where no single one gains, groups get
# stuck later, and a random swap now and then (an escape) gets either going again.

# %%
matrices = [np.random.default_rng(seed).random((32, 16)) for seed in range(8)]
found = {}
for method, search in permutation.SEARCHES.items():
    found[method] = np.mean([permutation.efficacy(matrix, search(matrix)) for matrix in matrices])
drawn, axes = figure(height=2.8)
axes.barh(list(found)[::-1], list(found.values())[::-1], color=COLOURS["method"])
axes.set(xlabel="efficacy (%), random 32 × 16 matrices", title="searching beats drawing at random")
assert found["best of 1,000"] < found["swaps"] < found["groups of 8"] < found["groups of 8, 100 escapes"]
drawn

# %% [markdown]
# ## A threshold must not depend on the scale
#
# The published code stops at gains below 3e-4, whatever the weights. A matrix of small weights is then not searched at
# all. Here gains are counted in units of a stripe's mean magnitude.

# %%
small = matrices[0] * 1e-4
largest = permutation.group_gains(small)[0].max()
print(f"largest gain at the start {largest:.1e}")
assert largest < 3e-4
assert np.array_equal(permutation.stripe_groups(small), permutation.stripe_groups(matrices[0]))

# %% [markdown]
# ## Folding: the function stays
#
# An order moves columns where a channel is read, and rows where it is written. These are all the places where the base
# model's channels can be reordered, and how many there are of each. After a random order at every one of them, the
# logits are the same but for rounding.

# %%
model, text = lab.model().double(), lab.calibration(0, 2)
with torch.no_grad():
    before = model(text)
    for place, site in sites(model).items():
        reorder(model, site, torch.randperm(site.channels))
        if place.startswith(("stream", "blocks.0")):
            print(f"{place:18} {site.channels:4} channels in {len(site.places)} places")
    assert torch.allclose(model(text), before, rtol=0, atol=1e-9)

# %% [markdown]
# What is missing: the dimensions of queries and keys. Rotary positions turn each at a frequency of its own, so that the
# same order for both still changes the scores. Only whole heads can move there. (It would not help 2:4 either: these
# are outputs.)

# %%
model = lab.model().double()
rows = tuple(Place(f"blocks.0.attention.{part}_proj.weight", 0) for part in "qk")
with torch.no_grad():
    reorder(model, Site(4, rows), torch.tensor([1, 0, 2, 3]))
    difference = (model(text) - before).abs().max().item()
print(f"largest difference of a logit {difference:.2f}")
assert difference > 1e-3

# %% [markdown]
# ## In the model: freedom is unequal
#
# Three kinds of channels are left: the residual *stream*, which most layers read; the *hidden* channels of a
# feed-forward layer, which only its down matrix reads; and the *values* of a head, which only o reads. Where is most to
# be gained? All layers that read the stream share one order, so thousands of rows must agree on it, and hardly any
# order suits them better than another. What down reads belongs to it alone. What o reads may be reordered within a head
# only.

# %%
model, reached = lab.model(), {"stream": [], "hidden": [], "values": []}
shares = [permutation.kept_share(model)]


def search_and_note(weight):
    order = permutation.find_order(weight, "swap")
    kind = {lab.config.dim: "stream", lab.config.hidden_dim: "hidden"}.get(weight.shape[1], "values")
    reached[kind].append(permutation.efficacy(weight.double().numpy(), order))
    return order


# %% [markdown]
# One search for each site, folded at once:

# %%
orders = reorder_inputs(model, search_and_note)
shares.append(permutation.kept_share(model))
drawn, axes = figure(height=2.6)
axes.barh(list(reached), [np.mean(values) for values in reached.values()], color=COLOURS["method"])
axes.set(xlabel="efficacy (%), mean over the sites", title="what one layer alone reads is free to move")
assert np.mean(reached["stream"]) < np.mean(reached["values"]) < np.mean(reached["hidden"])
assert shares[1] > shares[0]
drawn

# %% [markdown]
# And what it brings: a percent of the magnitude looks like little, but these are the large weights among those that
# 2:4 would drop. The same zeros, the same speed, and nothing was trained.

# %%
plain = lab.model()
prune_each(plain, n_m_mask)
prune_each(model, n_m_mask)
perplexity = {"dense": lab.base_perplexity, "2:4": lab.perplexity(plain), "2:4, reordered": lab.perplexity(model)}
drawn, axes = figure(height=2.0)
colours = [COLOURS[role] for role in ("method", "baseline", "muted")]
axes.barh(list(perplexity)[::-1], list(perplexity.values())[::-1], color=colours)
axes.set(xlabel="perplexity", title="the same zeros in a better order")
assert perplexity["dense"] < perplexity["2:4, reordered"] < perplexity["2:4"]
drawn

# %% [markdown]
# The order in which a model is stored is itself an accident, a good or a bad one. The recorded measurement therefore
# starts from three orders, and searches with groups of 8. (It is measured on more text than the figure above.)

# %%
record = claims.recorded("permutation")
print(record["sentence"])
print(record["setting"])
numbers = record["numbers"]
assert numbers["perplexity, reordered, 2:4"] < numbers["perplexity, 2:4"]

# %% [markdown]
# ## The kernel: a product with max for times
#
# Each swap tried alone reads two stripes, eight bfloat16 of each row, and there are K² / 2 swaps of K columns. In tiles
# of T columns, a program reads each row's 2 T numbers once and makes T² pairs of them on chip. The floor reads the
# weight once and writes K² float32 gains. What is left is arithmetic, and no tensor core knows max.

# %%
rows_, columns, tile = 4096, 4096, 32
alone = 4 * rows_ * columns**2 * 2
tiled = rows_ * columns * 2 * columns // tile
floor = 2 * rows_ * columns + 4 * columns**2
print(f"alone {alone / 1e9:.0f} GB, tiled {tiled / 1e9:.2f} GB through the caches, floor {floor / 1e9:.2f} GB")
assert alone > 100 * tiled and tiled > 10 * floor

# %% [markdown]
# The cases, layers of Llama-7B in bfloat16, with the time that an H200 needs for the bytes alone. These kernels are
# bound by arithmetic, so expect more.

# %%
for case in cases.cases("sparsity.permutation"):
    floor = 1e6 * case.bytes / hardware.GPUS["H200"].bandwidth
    print(f"{case.name:24} {case.bytes / 1e6:6.1f} MB, at least {floor:5.1f} µs; {case.operations:.1e} operations")
assert all(case.operations > 10 * case.bytes for case in cases.cases("sparsity.permutation"))

# %% [markdown]
# That tiles and sums stay in registers can be seen without a GPU, in the machine code that the compiler makes for one
# (an H100 or H200, sm_90). Below it, where there are any, timings on a GPU.

# %%
report = check.static_report("sparsity.permutation", [90])
for line in report:
    print(f"{line['case']:24} {line['kernel']:14} {line['registers']:3} registers, {line['spill_bytes']} bytes spilled")
assert not any(line["failures"] for line in report)
for line in bench.recorded("sparsity.permutation"):
    print(f"{line['gpu']}, {line['case']}: {line.get('median_us', float('nan')):.0f} µs")
if not bench.recorded("sparsity.permutation"):
    print("no timings recorded yet: python -m kernels bench permutation, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: efficacy, the gains of swaps and of splits, and two functions of the kernels.
#
# ```
# python -m chapters exercise permutation --to my
# python -m pytest --submission my tests/sparsity/test_permutation.py
# ```
#
# And to reorder and prune a model of your own:
#
# ```
# python -m chapters run permutation --model PATH --save pruned
# python -m minitfm generate --model pruned
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["permutation"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["permutation"])) == 5
assert len(surgery.linears(model)) == 7 * lab.config.layers
