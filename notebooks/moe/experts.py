# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Experts: many small products, or one
#
# In a mixture of experts, several feed-forward layers stand side by side, and a gate has said which of these experts
# each token goes to (the chapter on routing tells how). The work that follows is little, but awkward: eight matrices,
# each for another handful of rows that lie all over the batch. This notebook sorts the rows, multiplies them in one go,
# and brings them back, and shows what that costs and whether a mixture is worth it.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.figures import COLOURS, figure, legend, panels, series
from chapters.lab import Lab
from chapters.moe import experts, routing
from chapters.runner import timed
from chapters.shared import moe_lab
from kernels import bench, cases, check, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Take the book's base model, copy each feed-forward layer eight times and let an untrained gate send each token to two
# of the copies. They are all alike and their weights sum to 1, so this computes what the model did before, and nothing
# else changes. How much longer does it take?

# %%
gate = routing.Gate(k=2, factor=None, renormalise="before")
model = moe_lab.upcycle(lab, moe_lab.Mixture(gate, experts=8))
tokens = lab.validation[:8]
found, looped = timed(model, tokens)
wanted, dense = timed(lab.model(), tokens)
assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
print(f"dense {1e3 * dense:.0f} ms, a loop over experts {1e3 * looped:.0f} ms")

# %% [markdown]
# Twice the work in the feed-forward layers, and a loop around it that asks for each expert who its tokens are, gathers
# them, computes, and scatters. Worse is the definition, in which each expert answers to every token:

# %%
ratio = np.array([1, 2, 4, 8, 16, 32, 64])
drawn, axes = figure(height=2.6)
axes.plot(ratio, ratio, **series("baseline"), label="every expert, every token")
axes.plot(ratio, np.minimum(ratio, 2), **series("method"), label="only the two chosen")
axes.set(xlabel="experts", ylabel="work, in dense layers", xscale="log", yscale="log")
legend(axes)
drawn

# %% [markdown]
# ## Sort
#
# Four tokens, two choices each, three experts. Choice j of token t is number 2 t + j. `permute` lists those numbers
# expert by expert, and says where each expert begins. A choice that was dropped stands at the end. Nobody chose expert
# 1: its run is empty.

# %%
expert = np.array([[2, 0], [0, 2], [2, 0], [0, 2]])
kept = np.array([[True, True], [True, True], [True, False], [True, True]])
order, offsets = experts.permute(expert, kept, 3)
print(order, offsets)
assert order.tolist() == [1, 2, 6, 0, 3, 4, 7, 5] and offsets.tolist() == [0, 3, 3, 7]

# %% [markdown]
# The sort is stable: within an expert, tokens come in their order, so the same routing gives the same rows. And the
# list is always tokens · k long, whatever the gate did. A GPU can be told the shapes of everything before the gate has
# run.

# %%
source = order // 2  # the token of each row
print(source)
assert (expert.ravel()[order[:7]] == np.repeat([0, 1, 2], np.diff(offsets))).all()

# %% [markdown]
# The same on the model: the choices of 64 tokens in its first layer. On the left as they lie in the batch, each
# expert's all over the place. On the right the same choices sorted: every expert has one run of rows, and the lines
# between them are the offsets.

# %%
moes = [module for module in model.modules() if isinstance(module, moe_lab.MoE)]
given = moes[0].routing.expert[:64].numpy()
rows, ends = experts.permute(given, np.ones_like(given, dtype=bool), 8)
drawn, axes = panels(2, width=8.4, height=2.4, sharey=True)
for place, taken, title in zip(axes, (given.ravel(), given.ravel()[rows]), ("as they lie", "sorted"), strict=True):
    place.scatter(range(128), taken, s=9, color=COLOURS["method"])
    place.set(xlabel="row (choice of a token)", title=title, yticks=range(8))
axes[1].vlines(ends, -0.5, 7.5, color=COLOURS["muted"], linewidth=0.8)
axes[0].set_ylabel("expert")
drawn

# %% [markdown]
# ## Multiply
#
# Each run of rows meets one matrix. `source` says where a row of x stands, so no sorted copy is needed. Rows that
# nobody has are 0, and a matrix without rows is not read: that of expert 1 here is NaN, and none comes out.

# %%
rng = np.random.default_rng(0)
x, up, down = rng.normal(size=(4, 5)), rng.normal(size=(3, 12, 5)), rng.normal(size=(3, 5, 6))
up[1] = np.nan
hidden = experts.grouped_matmul(x, up, offsets, source)
assert np.isfinite(hidden).all() and (hidden[7] == 0).all()
np.testing.assert_allclose(hidden[3], up[2] @ x[0])

# %% [markdown]
# ## Bring back
#
# After the second product each row is weighed and added to its token, best choice first: in floating point the order
# of a sum is part of the result. The three steps are the layer, and the definition agrees.

# %%
up[1] = 0
route = routing.Routing(expert, np.where(kept, 0.5, 0.0), np.where(kept, 0, 9), np.array([4, 0, 4]), capacity=4)
y = experts.grouped_matmul(experts.activate(hidden), down, offsets)
out = experts.combine(y, order, route.weight)
np.testing.assert_allclose(out, experts.feed_forward(x, up, down, route))
np.testing.assert_allclose(out, experts.every_expert(x, up, down, route))

# %% [markdown]
# What does not fit is refused, in words.

# %%
for bad in (offsets[:3], offsets + 1, offsets[::-1]):
    try:
        experts.grouped_matmul(x, up, bad, source)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## In the model
#
# `stacked` puts the experts of a layer into two tensors and sorts instead of looking. The logits stay. What do you
# expect of the time? On a CPU the products are the same and take most of it, so hardly anything is gained. It is a GPU
# that waits for launches, and for whoever asks it which tokens an expert has.

# %%
for block in model.blocks:
    block.feed_forward = experts.stacked(block.feed_forward)
again, grouped = timed(model, tokens)
assert torch.allclose(found, again, rtol=1e-3, atol=1e-3)
print(f"a loop over experts {1e3 * looped:.0f} ms, sorted {1e3 * grouped:.0f} ms")

# %% [markdown]
# ## Decoding: which weights are read
#
# A decode step has one token for each sequence. It reads the experts that these chose, and memory is what it waits for.
# One sequence reads k of E; with even gates that choose independently, T sequences read E (1 - (1 - k / E)^T). Soon
# that is nearly all of them: a mixture decodes cheaply for one reader, or for very many, who share what is read, and
# least so in between.

# %%
counts = np.array([1, 2, 4, 8, 16, 32])
measured = [experts.touched(model, lab.validation[:32], int(n)) for n in counts]
drawn, axes = figure(height=2.6)
axes.plot(counts, measured, **series("method"), label="measured")
axes.plot(counts, 8 * (1 - 0.75**counts), **series("reference"), label="even gates")
axes.set(xlabel="tokens of a decode step", ylabel="experts read", xscale="log", ylim=(0, 8.2))
legend(axes)
assert measured[0] == 2 and all(np.diff(measured) > 0) and measured[-1] <= 8
drawn

# %% [markdown]
# ## Is it worth it?
#
# The claim that mixtures are known for: at the same operations for a token, more weights make a better model. Two
# small models learn from random weights on the same text: a dense one, and one with eight experts of half the dense
# layer's size, of which a token uses two. Here they get a hundred steps, which is where an expert, with a quarter of
# the tokens to learn from, is still behind.

# %%
pair = experts.fresh(lab, 100, seed=0)
for name, one in pair.items():
    print(f"{name}: {one.num_parameters():,} weights, perplexity {lab.perplexity(one):.0f}")
assert pair["8 experts"].num_parameters() > 1.5 * pair["dense"].num_parameters()
assert all(lab.perplexity(one) < lab.config.vocab_size for one in pair.values())

# %% [markdown]
# The recorded claim trains for longer, from three seeds: this book's text, read about twice. The papers' models read
# billions of tokens, which can feed more weights. The gate matters as well: in trials one expert of eight, weighed by
# its raw gate as Switch has it, so that its answer starts at about an eighth, stayed behind the dense model. What the
# record found with two of eight, weighed to one between them, in its own words:

# %%
record = claims.recorded("experts")
print(record["sentence"] if record else "not recorded yet: python -m chapters claim experts --full")
assert record is None or record["numbers"]["weights, 8 experts / dense"] > 1.5

# %% [markdown]
# ## The kernel, in bytes
#
# A layer of Mixtral for 4096 tokens. Sorting a copy, one product for each expert, and scattering what comes out move
# every row twice more than the kernel does. It reads a row where it stands and stores it where it belongs. At this
# size operations decide. For four tokens the weights are nearly all that moves.

# %%
h200 = hardware.GPUS["H200"]
for case in cases.cases("moe.experts"):
    seconds = case.bytes / h200.bandwidth, case.operations / h200.bf16
    limit = "memory" if seconds[0] > seconds[1] else "operations"
    print(f"{case.name:52} {case.bytes / 1e6:6.0f} MB, at least {1e6 * max(seconds):5.0f} µs on an H200: {limit}")
    assert (limit == "memory") == ("T=4 " in case.name or "T=16 " in case.name)

# %% [markdown]
# The same as a roofline: how many operations a second an H200 can do at the most, if it does so many for each byte that
# it moves. Left of the bend memory is the limit, right of it arithmetic. Cases of few tokens (squares) stand far to the
# left: each weight that is read meets a handful of rows. Those of 4096 tokens (dots) stand under the flat roof.

# %%
drawn, axes = figure(height=2.8)
intensity = np.logspace(0, 4, 100)
roof = np.minimum(intensity * h200.bandwidth, h200.bf16) / 1e12
axes.plot(intensity, roof, color=COLOURS["reference"])
for case in cases.cases("moe.experts"):
    per_byte = case.operations / case.bytes
    best = min(per_byte * h200.bandwidth, h200.bf16) / 1e12
    axes.plot(per_byte, best, **series("method" if "T=4096" in case.name else "baseline"))
axes.set(xlabel="operations for a byte", ylabel="Tflop/s at the most", xscale="log", yscale="log")
drawn

# %% [markdown]
# ## Who takes which tile
#
# Tiles are numbered expert by expert, and a program finds the expert of its number from the running sum of the counts.
# Within an expert, numbers run through bands of eight row tiles. Programs that work at the same time then share rows
# of x and of the matrix, which the L2 cache gives them: 132 programs, counted both ways.

# %%
row_tiles, columns = np.arange(132) % 8, np.arange(132) // 8  # in bands
along = np.arange(132) % 224, np.arange(132) // 224  # along a row of 224 column tiles first
banded = len(set(row_tiles)) + len(set(columns))
print(f"in bands {banded} tiles are read for 132 products, along rows {len(set(along[0])) + len(set(along[1]))}")
assert banded < 132 / 4

# %% [markdown]
# What the compiler makes of it, seen without a GPU (here for an H100 or H200, sm_90):

# %%
report = check.static_report("moe.experts", [90])
for row in report:
    print(f"{row['case']:52} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's grouped product and a loop of cuBLAS:

# %%
for row in bench.recorded("moe.experts"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("moe.experts"):
    print("not recorded yet: python -m kernels bench moe.experts, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the order, the grouped product, the way back, and how the kernel finds its expert.
#
# ```
# python -m chapters exercise experts --to my
# python -m pytest --submission my tests/moe/test_experts.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.moe
# chapters.moe.__path__.insert(0, "../../my/chapters/moe")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["experts"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["experts"])) == 4
