# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Flash-Decoding: one query, the whole GPU
#
# To write one token, a model looks back at all tokens before it. There is one query per head, and it has to read every
# key and value in the cache. FlashAttention gives each head (and each tile of queries) to one part of the GPU, which is
# fine for a prompt of a thousand queries. For a single one it leaves nearly all of the GPU idle. This notebook cuts the
# keys instead, and then asks what else a decode step can do without.

# %%
import itertools

import numpy as np
import torch

from chapters import workbook
from chapters.attention import flash_decoding as decoding
from chapters.attention.flash import attention
from chapters.explore import explore
from chapters.figures import COLOURS, LINESTYLES, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.shared.decode_measures import linears, record_attention, visible_scores
from kernels import bench, cases, check, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# An H200 has 132 multiprocessors, parts that compute side by side. Llama-3-8B has 8 key heads. Let one program, on one
# multiprocessor, serve each of them (with all the query heads that share it), for a growing batch. What share of the
# multiprocessors has something to do?

# %%
batches = range(1, 33)
whole, cut = decoding.occupancy(batches, length=8192)
drawn, axes = figure(height=2.6)
axes.plot(batches, whole, **series("baseline"))
axes.set(xlabel="texts written together", ylabel="share of GPU busy", ylim=(0, 1.05))
axes.set_title("one program a head: a single text leaves the GPU idle")
assert whole[0] < 0.1 and whole[15] > 0.9 and whole[16] < 0.6
drawn

# %% [markdown]
# A single text uses fewer than a tenth, however long it is. At 16 texts the GPU is full; one more, and a second wave
# begins that has nearly nothing to do.
#
# ## The idea
#
# Cut the keys into runs, one for each program. A run r leaves two things, which a softmax over its keys alone gives:
# its output o_r, a mean of values, and lse_r, the log of the sum of its exponentials. From these the whole follows:
# with lse = log Σ exp(lse_r), each run weighs exp(lse_r − lse), and the output is the weighted sum of the o_r.
#
# Here are the queries, keys and values of the last layer of our model, and the newest token's attention in three runs,
# of 30, 90 and 8 keys. How much will the last eight tokens weigh, out of 128?

# %%
q, k, v = (x.astype(np.float64) for x in record_attention(lab, lab.validation[:1])[-1])
newest = q[:, :, -1:]
bounds = [0, 30, 120, 128]
parts = [decoding.partial_attention(newest, k, v, *run) for run in itertools.pairwise(bounds)]
outs, lses = (np.stack(part) for part in zip(*parts, strict=True))
weights = np.exp(lses - decoding.combine(outs, lses)[1])[:, 0, :, 0]
np.testing.assert_allclose(weights.sum(0), 1)

# %% [markdown]
# A row for each run, a column for each head; each column sums to 1.

# %%
drawn, axes = figure(width=5.2, height=2.0)
heatmap(axes, weights, "weight", limit=1, digits=2)
axes.set(xlabel="head", ylabel="keys", title="the length of a run says little about its weight")
axes.set_yticks(range(3), [f"{a} to {b - 1}" for a, b in itertools.pairwise(bounds)])
drawn

# %% [markdown]
# The weighted sum is plain attention:

# %%
expected = attention(newest, k, v)
for found, truth in zip(decoding.combine(outs, lses), expected, strict=True):
    np.testing.assert_allclose(found, truth, atol=1e-12)

# %% [markdown]
# And so it is for any other cuts, runs without a single key included. Those have an lse of −∞, and weigh nothing.

# %%
errors = [decoding.partition_error([(q, k, v)], seed, np.float64) for seed in range(5)]
assert max(errors) < 1e-12
for splits in (1, 2, 7, 128, 200):
    out, _ = decoding.flash_decoding(newest, k, v, splits)
    np.testing.assert_allclose(out, expected[0], atol=1e-12)

# %% [markdown]
# ## How many runs?
#
# As many as it takes to fill the GPU, and no more, because each leaves an output to be read again. A kernel reads keys
# in tiles of 64, and some counts are useless: 64 tiles in 33 runs still have a run of two tiles, like 32. flash-attn's
# rule takes the smallest count that is within 85% of the best.


# %%
def all_counts(texts=1):
    counts = np.arange(1, 65)
    share = [decoding.busy(8 * texts * count, 132) for count in counts]
    chosen = decoding.number_of_splits(8 * texts, 132, tiles=128)
    drawn, axes = figure(height=2.4)
    axes.plot(counts, share, color=COLOURS["muted"])
    axes.plot([chosen], [share[chosen - 1]], **series("accent"))
    axes.set(xlabel="runs that the keys are cut into", ylabel="share of GPU busy", ylim=(0, 1.05))
    axes.set_title(f"{texts} × 8 key heads, 8,192 keys: {chosen} run{'s' * (chosen > 1)} taken")
    return drawn


# %% [markdown]
# Below, all counts, and the one taken (triangle). Every tooth is a further wave of programs. Live, take more texts:
# from which number on is nothing cut?

# %%
explore(all_counts, texts=(1, 20))

# %% [markdown]
# With the rule a single text keeps at least three quarters busy, and so do 2 to 13, as the claim's figure shows below
# for all batches. What remains is the second wave of 17 texts: the rule does not cut what already has enough programs.

# %%
assert min(cut[:13]) > 0.75 and cut[16] == whole[16]

# %% [markdown]
# ## One maximum for all
#
# Runs have to be weighed because each has subtracted its own largest score before it took exponentials, lest they
# overflow. FlashDecoding++ subtracts the same number φ everywhere. Then sums of exponentials simply add. But exp(x − φ)
# overflows where a score x is far above φ, and vanishes where it is far below. So φ is chosen once, from the scores
# that a model has been seen to make, and rows that stray out of the range that numbers can carry are done again,
# properly. How far do the scores of our model reach?

# %%
layers = record_attention(lab, lab.validation[:8])
scores = [visible_scores(*layer[:2]) for layer in layers]
reach = np.ptp(np.concatenate(scores))
drawn, axes = figure(height=2.6)
for i, role in zip(range(len(layers)), ("method", "baseline", "accent", "second", "third"), strict=False):
    look = {"color": COLOURS[role], "linestyle": LINESTYLES[role], "linewidth": 1.5, "label": f"layer {i}"}
    axes.hist(scores[i], bins=40, histtype="step", log=True, **look)
axes.set(xlabel="score", ylabel="pairs of tokens", title="the layers reach differently far")
legend(axes)
drawn

# %% [markdown]
# Float32 exponentials carry a range of about 150, far more than that. Float16, in which tensor cores would like to have
# their weights, carries 21.

# %%
widest = decoding.carried_range(np.float32, 128)
assert np.ptp(decoding.HALF_RANGE) < 21 < 140 < np.ptp(widest)
assert reach < np.ptp(widest)
_, _, again = decoding.unified_max_attention(*layers[-1], 0.0, *widest)
assert not again.any()

# %% [markdown]
# Whatever the range, the result is right, because the rows that stray are recomputed. A narrow range only costs time.
# The text of 128 tokens has 128 rows in each head; one stray score is enough to send a row back.

# %%
ranges = [2, 5, 10, 20, 40, 60]
redone = [np.mean([decoding.unified_max_attention(*layer, 0.0, -r, r)[2].mean() for layer in layers]) for r in ranges]
out, _, again = decoding.unified_max_attention(q, k, v, 0.0, -2, 2)
np.testing.assert_allclose(out, attention(q, k, v)[0], atol=1e-12)
drawn, axes = figure(height=2.2)
axes.plot(ranges, redone, **series("method"))
axes.set(xlabel="scores allowed, ± around φ = 0", ylabel="rows done again", title="a narrow range costs time")
axes.yaxis.set_major_formatter("{x:.0%}")
assert again.any() and redone == sorted(redone, reverse=True)
drawn

# %% [markdown]
# ## The claim
#
# All of it, measured: cuts, occupancy, and the rows that a unified maximum sends back. What do you expect of float16,
# with a range of 21 for the scores that you saw above?

# %%
claim = decoding.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# So the claim holds: it asks for all three at once, for float32. In float16 a single maximum for this model would send
# many rows back. What the figure does not show is time. That the multiprocessors are busy is necessary for speed, and
# whether it is enough only a GPU can tell.

# %%
assert claim.holds
assert claim.numbers["part recomputed, float32"] <= claim.numbers["part recomputed, float16"]

# %% [markdown]
# ## Flat products
#
# The linear layers of a decode step have a row for each text: 1, 4, 16. Kernels for large products work in tiles of 64
# rows or more and fill up with zeros. `flat_matmul` pads to 16. With three rows, that is still four fifths of zeros,
# but not more than 95%:

# %%
x, weight = np.random.default_rng(0).normal(size=(3, 20)), np.random.default_rng(1).normal(size=(50, 20))
np.testing.assert_allclose(decoding.flat_matmul(x, weight), x @ weight.T, atol=1e-12)
zeros = {tile: 1 - len(x) / tile for tile in (64, 16)}
assert zeros[64] > 0.95 and zeros[16] < 0.82

# %% [markdown]
# ## A table, measured
#
# Which way is the fastest depends on the shape and on the machine. So FlashDecoding++ measures them all once, and looks
# the answer up from then on. Here for a layer of our model on this CPU: (rows, outputs, inputs) and the way that won. A
# CPU has no tiles to fill, so padding seldom pays; on a GPU, the kernel is among the candidates. What the table says is
# true of the machine that ran this notebook, and may differ on yours:

# %%
shapes = [(M, lab.config.hidden_dim, lab.config.dim) for M in (1, 2, 4, 8, 16, 64)]
table = decoding.dispatch_table(shapes, linears(), repeats=9)
assert list(table) == shapes and set(table.values()) <= set(linears())
for shape, way in table.items():
    print(shape, way)

# %% [markdown]
# ## The kernel, in bytes
#
# One program takes all query heads that share a key head as the rows of one product, so each key is read once. For
# every byte read there is next to nothing to compute. A GPU's limits make a roof: its bandwidth times the operations
# for each byte, the slope, until its arithmetic is the limit, the flat part. Where under this roof do FlashAttention on
# a prompt and a decode step stand?

# %%
gpu, step, prompt = hardware.GPUS["H200"], cases.cases("attention.flash_decoding")[0], cases.cases("attention.flash")[0]
drawn, axes = figure(height=2.6)
x = np.geomspace(0.5, 4096, 50)
axes.loglog(x, np.minimum(gpu.bf16, x * gpu.bandwidth) / 1e12, **series("reference"), label="roof of an H200")
for case, role, name in ((step, "method", "decode step"), (prompt, "baseline", "prompt of 4,096 tokens")):
    best = case.operations / hardware.floor_seconds(case, gpu) / 1e12
    axes.plot([case.operations / case.bytes], [best], **series(role) | {"linestyle": ""}, label=name)
axes.set(xlabel="operations per byte", ylabel="TFLOP/s")
legend(axes)
drawn

# %% [markdown]
# The prompt reaches the flat part, the decode step stands at the foot of the slope: 4 operations a byte, because 4
# query heads share a key head. Its floor is the time to read keys and values. By the multiprocessors alone that one
# program a head would occupy, reading at their share of the bandwidth, it would take 16 times as long for a single
# text.

# %%
for case in cases.cases("attention.flash_decoding"):
    print(f"{case.name:24} {case.bytes / 1e6:6.1f} MB, at least {1e6 * hardware.floor_seconds(case, gpu):6.1f} µs")
    assert hardware.floor_seconds(case, gpu) == case.bytes / gpu.bandwidth, "memory is what it waits for"
assert 1 / whole[0] > 16

# %% [markdown]
# What the compiler makes of it for an H100 or H200, seen without one: loads of 128 bits, tensor cores, no spills.

# %%
report = check.static_report("attention.flash_decoding", [90])
for row in report:
    print(f"{row['case']:24} {row['kernel']:18} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch:

# %%
for row in bench.recorded("attention.flash_decoding"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("attention.flash_decoding"):
    print("not recorded yet: python -m kernels bench attention.flash_decoding, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the combination, the number of splits, the unified maximum with its way back, and
# the decode kernel.
#
# ```
# python -m chapters exercise flash_decoding --to my
# python -m pytest --submission my tests/attention/test_flash_decoding.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["flash_decoding"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["flash_decoding"])) == 4
