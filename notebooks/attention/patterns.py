# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Sparse patterns: which keys does a query need to see?
#
# Attention compares every token with all before it. Twice the text, four times the work. Yet most of the weights are
# next to nothing. Sparse Transformer, Longformer, ETC and BigBird decide beforehand which pairs are computed at all.
# This notebook draws their masks, counts what they cost, and puts them into a model that never saw them.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import patterns
from chapters.explore import explore
from chapters.figures import COLOURS, BookFigure, figure, legend, panels, series, style
from chapters.lab import Lab
from chapters.shared.decode_measures import record_attention
from chapters.shared.pattern_measures import costs, draw_mask, layers_needed, perplexity_ratio
from kernels import bench, cases, check, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# We listen in on the base model while it reads 128 tokens, and sort the weights that each query gives to its keys by
# size. How many of the keys does it take to gather nine tenths of the weight: nearly all, half, a few?

# %%
needed = []
for q, k, _ in record_attention(lab, lab.validation[:4]):
    scores = np.where(np.tri(q.shape[2]) > 0, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[3]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = -np.sort(-weights / weights.sum(axis=-1, keepdims=True), axis=-1)
    needed.append((weights.cumsum(axis=-1) < 0.9).sum(axis=-1) + 1)
share = np.mean(needed, axis=(0, 1, 2)) / np.arange(1, 129)
assert share[64:].mean() < 0.6, "far fewer than it pays for"

# %% [markdown]
# The last query of the text pays for 128 keys and hardly needs half of them. The part shrinks as texts grow, and the
# bill does not.

# %%
drawn, axes = figure(height=2.4)
axes.plot(np.arange(1, 129), share, color=COLOURS["method"])
axes.set(xlabel="keys that the query sees", ylabel="share of keys", ylim=(0, 1.05))
axes.set_title("how many of them hold 90% of the weight")
drawn

# %% [markdown]
# ## A pattern is a question
#
# May the query at position i see the key at position j? `Pattern` holds the answer as a function of both, and `|` (or)
# and `&` (and) join patterns. A window sees the neighbours; a global token sees all and is seen by all; a causal mask
# hides what comes later. These are Longformer's window and its global tokens, and the past of both together. Rows are
# queries, columns are keys, dark is seen.

# %%
window, few = patterns.window(6), patterns.global_tokens([0, 1])
both = (window | few) & patterns.causal()
np.testing.assert_array_equal(both.dense(24), (window.dense(24) | few.dense(24)) & np.tri(24, dtype=bool))
drawn, axes = panels(3, width=7.2, height=2.6)
for place, (name, pattern) in zip(axes, {"window": window, "global": few, "causal, both": both}.items(), strict=True):
    draw_mask(place, patterns.block_mask(pattern, 24, 24, 1, 1))
    place.set(title=name, xlabel="key", ylabel="query")
drawn

# %% [markdown]
# ## All of them
#
# Below are the published patterns for 64 tokens, in blocks of 8. Darkest (blue) are blocks that are seen whole. Less
# dark (green) are pairs that are seen in other blocks, and the pale ones beside them are computed in vain, because a
# GPU multiplies whole blocks. White is skipped. The share is that of blocks that are computed. First as encoders use
# them, seeing both sides.


# %%
def pictures(size=16, past_only=False):
    """Every mask of 64 tokens, and the share of its blocks that holds a pair."""
    drawn = BookFigure(figsize=(6.4, 7.0), layout="constrained", facecolor="white")
    masks = patterns.methods(64, size, 8, 0, past_only)
    for place, (name, pattern) in zip(drawn.subplots(3, 3).flat, masks.items(), strict=True):
        mask = patterns.block_mask(pattern, 64, 64, 8, 8)
        draw_mask(style(place), mask)
        place.set_title(f"{name}: {costs(mask)['share of blocks']:.0%}")
    return drawn


# %% [markdown]
# The size of windows, blocks and strides can be turned where the notebook is live. Which pattern hides half of what it
# reaches, and saves nothing by that?

# %%
explore(pictures, size=[8, 16, 32])

# %% [markdown]
# A dilated window: every second pair of a band, in every block of the band. And as decoders use them, cut at the
# diagonal. Note BigBird: its last block, which all may see in an encoder, lies in the future here and is left out, and
# its random blocks are drawn from the past.

# %%
pictures(past_only=True)

# %% [markdown]
# ## What each costs, and how far it carries
#
# Two questions to a pattern. How much is computed: pairs, and the blocks that hold them. And how many layers does it
# take until every token can know something of every earlier one? A layer passes on what it sees, so this is the longest
# of the shortest paths in the graph whose edges the mask draws. Here for decoders, 256 tokens in blocks of 16:

# %%
table = []
for name, pattern in patterns.methods(256, 16, 16).items():
    found = costs(patterns.block_mask(pattern, 256, 256, 16, 16))
    table.append((name, found["share of pairs"], found["share of blocks"], layers_needed(pattern.dense(256))))
    print(f"{name:11} {table[-1][1]:4.0%} of all pairs  {table[-1][2]:4.0%} of all blocks  {table[-1][3]:4.0f} layers")
layers = {name: need for name, _, _, need in table}
assert layers["strided"] == layers["fixed"] == 2 < layers["local"]
assert layers["blockwise"] == layers["dilated"] == np.inf

# %% [markdown]
# Two layers suffice for both patterns of Sparse Transformer, as its paper promises, while a window needs more layers
# the longer the text is. Blocks alone never meet, and a dilated window sees only positions as odd or as even as its
# own: Longformer gives it to some heads only. Its global tokens help an encoder; at the start of a text that is written
# from left to right they know nothing of what follows, and shorten no path.
#
# ## Blocks, because hardware multiplies tiles
#
# A GPU does not skip single pairs. `block_mask` sorts the blocks of queries and keys: dead, full, or partial, and only
# of the partial ones it keeps the pairs. Whatever the sizes of blocks, the mask that comes out is the one that went in;
# larger blocks are fewer, and more of them are partial.

# %%
pattern = patterns.methods(100, 16, 16)["bigbird"]
for block_q, block_k in ((1, 1), (16, 16), (7, 50), (128, 128)):
    mask = patterns.block_mask(pattern, 100, 100, block_q, block_k)
    np.testing.assert_array_equal(mask.dense()[0], pattern.dense(100))
    print(f"{block_q:3} × {block_k:3}: {mask.full.sum():5} full, {mask.partial.sum():5} partial, of {mask.full.size}")

# %% [markdown]
# Attention then walks from live block (full or partial) to live block with FlashAttention's running softmax.
# `attend_row` does it for one row of blocks. It equals attention with the dense mask, and never looks at a dead block:
# below, dead keys and values are NaN, and the output has none.

# %%
q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 100, 8))
mask = patterns.block_mask(pattern, 100, 100, 16, 16)
out, _ = patterns.block_sparse_attention(q, k, v, mask)
exact = torch.nn.functional.scaled_dot_product_attention(
    *map(torch.from_numpy, (q, k, v)), attn_mask=torch.from_numpy(pattern.dense(100))
)
np.testing.assert_allclose(out, exact, atol=1e-12)
dead = np.repeat(~(mask.partial | mask.full)[0, 4], 16)[:100, None]
last, _ = patterns.attend_row(q[..., 64:80, :], *(np.where(dead, np.nan, x) for x in (k, v)), mask, 0, 4, 8**-0.5)
np.testing.assert_allclose(last, out[..., 64:80, :], atol=1e-12)

# %% [markdown]
# What of a query that sees nothing? A softmax over no keys is 0 / 0. Here it gives 0, and gradients stay numbers. In
# batches of texts that were padded, such rows are common.

# %%
hidden = pattern.dense(100).copy()
hidden[3] = False
tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
result = patterns.sparse_attention(*tensors, patterns.block_mask(hidden, 100, 100, 16, 16))
assert not result[0, 0, 3].any()
assert all(x.isfinite().all() for x in torch.autograd.grad(result.sum(), tensors))

# %% [markdown]
# ## A stride touches everything
#
# Strided attention sees every 16th key: very few pairs, but some in each block. Nothing can be skipped. But a token is
# only a row and a column, and these may be put in any order. Sort the tokens by their position modulo 16, as OpenAI's
# code does, and the same pairs lie in a few blocks along the diagonal.

# %%
stride = patterns.strided(16) & patterns.causal()
ways = {"as it is": stride, "sorted": stride.reordered(patterns.stride_order(256, 16))}
drawn, axes = panels(2, width=6.0, height=3.0)
for place, (name, way) in zip(axes, ways.items(), strict=True):
    mask = patterns.block_mask(way, 256, 256, 16, 16)
    draw_mask(place, mask)
    place.set(title=f"{name}: {costs(mask)['share of blocks']:.0%} of blocks", xlabel="key", ylabel="query")
live = [costs(patterns.block_mask(way, 256, 256, 16, 16))["blocks"] for way in ways.values()]
assert live[0] == 16 * 17 / 2 and live[1] == 16
drawn

# %% [markdown]
# ## Time follows the blocks
#
# This is the chapter's claim, measured: many patterns over 2,048 tokens, their time against the pairs that they see
# and against the blocks that they visit. On the right, what a pattern costs when it is put into the base model, which
# was trained to see everything. Which of the patterns above will hurt the most, and which the least?

# %%
claim = patterns.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# On the left, dots lie on the diagonal: blocks explain the time. Crosses do not: pairs don't. And sparsity is no gift:
# each pattern makes this model worse, those that hide the nearest tokens by far the most. Papers train with their
# pattern and lose little; here nothing was trained. Texts of 128 tokens do not show what a window loses on long ones.

# %%
ratios = {name.split(", ")[1]: x for name, x in claim.numbers.items() if name.startswith("perplexity ratio")}
assert claim.holds and min(ratios.values()) > 1
assert ratios["dilated"] > ratios["blockwise"] > ratios["local"]

# %% [markdown]
# The longer the window, the smaller the loss, for any pattern. Blocks of the same size lose far more, because a token
# at the start of a block has no past:

# %%
sizes = [8, 16, 32, 64]
drawn, axes = figure(height=2.6)
for name, role in (("blockwise", "baseline"), ("local", "method"), ("longformer", "second")):
    tried = [patterns.sparse_attend(patterns.methods(128, size, 16)[name], 16) for size in sizes]
    measured = [perplexity_ratio(lab, [way], 16) for way in tried]
    axes.plot(sizes, measured, **series(role), label=name)
    assert measured[0] > measured[-1] and measured[-1] < 1.3
axes.set(xlabel="tokens of the window or block", ylabel="perplexity, all keys = 1", xticks=sizes)
legend(axes)
drawn

# %% [markdown]
# ## The kernel
#
# One program holds a tile of queries and follows the list of its row: partial blocks first, each with a bit for every
# pair, then the full ones, which need no mask at all. A bit costs little: a partial block of 128 × 128 pairs adds 2 KB
# to the 64 KB of its keys and values.

# %%
case = cases.cases("attention.patterns")[1]
gpu = hardware.GPUS["H200"]
print(f"{case.name}: {case.bytes / 1e6:.0f} MB, at least {1e6 * case.bytes / gpu.bandwidth:.0f} µs; "
      f"{case.operations / 1e9:.0f} GFLOP, at least {1e6 * case.operations / gpu.bf16:.0f} µs")  # fmt: skip
assert hardware.floor_seconds(case, gpu) == case.operations / gpu.bf16
assert 128 * 128 / 8 < 0.04 * 2 * 2 * 128 * 128

# %% [markdown]
# Without a GPU its machine code can be read (here for an H100 or H200, sm_90): tensor-core instructions, loads of 128
# bits, no spilled registers.

# %%
report = check.static_report("attention.patterns", [90])
for row in report:
    print(f"{row['case'][:42]:42} {row['kernel']:21} {row['registers']:3} registers, "
          f"{row['spill_bytes']} bytes spilled, {row['tensor_instructions'] or 'no tensor cores'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's flex_attention:

# %%
for row in bench.recorded("attention.patterns"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.patterns"):
    print("not recorded yet: python -m kernels bench attention.patterns, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: a window, random blocks, the sorting of blocks, a row of attention, and the inner
# loop of the kernel.
#
# ```
# python -m chapters exercise patterns --to my
# python -m pytest --submission my tests/attention/test_patterns.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["patterns"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["patterns"])) == 5
