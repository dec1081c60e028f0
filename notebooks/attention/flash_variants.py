# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # FlashAttention's masks and biases
#
# Hardly any model attends plainly. Mistral looks back at a window, Gemma 2 caps its scores, ALiBi models count how far
# a key is away, and whoever serves or trains with texts of many lengths puts them end to end in one row. FlashAttention
# takes all of it, and this notebook shows why that costs so little: each of these acts on one score at a time.
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
from itertools import pairwise

import numpy as np
import torch

from chapters import workbook
from chapters.attention import flash_variants
from chapters.attention.flash_variants import alibi_slopes, attention, flash_attention, flash_attention_backward
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared import variant_measures
from chapters.shared.decode_measures import record_attention
from chapters.shared.visible_tiles import query_tiles, reach, runs, spans
from kernels import bench, check, hardware
from kernels.attention.flash_variants import CASES

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Sixteen requests, prompt and answer, as long as people's are. A batch is a rectangle, so all of them become as long as
# the longest: the model computes the hatched part as well, and throws it away. With attention it is worse, because it
# counts squares.

# %%
lengths = sorted(variant_measures.draw_lengths(lab, 0))
drawn, axes = figure(height=2.6)
axes.bar(range(16), [max(lengths)] * 16, color="white", edgecolor=COLOURS["baseline"], hatch="////", label="padding")
axes.bar(range(16), lengths, color=COLOURS["method"], label="tokens")
axes.set(xlabel="request, the shortest first", ylabel="positions", title="most of a padded batch is padding")
legend(axes, bbox_to_anchor=(1, 0.5), loc="center left")
assert sum(lengths) < 0.6 * 16 * max(lengths)
drawn

# %% [markdown]
# ## One score at a time
#
# Three things may happen to the score x of a query at position p with the key at position j. A soft cap c bends it:
# c tanh(x / c) stays within ±c, and is nearly x where x is small. ALiBi takes off m |j − p|, with a slope m for each
# head: far keys count less, which takes the place of an embedding of positions. A mask makes it −∞. The order matters:
# a cap that came last would make a finite number of −∞. `modified_scores` does all three.

# %%
x = np.linspace(-12, 12, 49)
drawn, axes = figure(height=2.4)
for cap, slope, role in ((None, None, "reference"), (5.0, None, "method"), (5.0, 0.5, "accent")):
    changed = flash_variants.modified_scores(x[None], np.full((1, 49), -4), 4, 0, cap, slope)[0]
    label = "as it is" if cap is None else "cap 5" if slope is None else "cap 5, slope ½, 4 keys away"
    axes.plot(x, changed, **series(role) | {"marker": ""}, label=label)
axes.set(xlabel="score x", ylabel="softmax gets", title="a cap bends, a bias shifts")
legend(axes)
drawn

# %% [markdown]
# A window (left, right) counts the keys besides the one at p, as flash-attn counts; where a paper says "a window of W
# tokens", it is (W − 1, 0). Here are the weights that the softmax makes of 24 × 24 equal scores after a window of 8 and
# with two of ALiBi's slopes, which halve from head to head. All keys of a window count alike; with a slope nearer keys
# count more, and far ones are forgotten softly.

# %%
distance = np.arange(24) - np.arange(24)[:, None]
drawn, axes = panels(3, width=8.2, height=2.3)
for place, left, slope in zip(axes, (7, np.inf, 7), (None, *alibi_slopes(8)[:2]), strict=True):
    weights = np.exp(flash_variants.modified_scores(np.zeros((24, 24)), distance, left, 0, None, slope))
    heatmap(place, weights / weights.sum(axis=1, keepdims=True), "", limit=0.5)
    title = (["window 8"] if left == 7 else []) + ([f"slope {slope:g}"] if slope else [])
    place.set(xlabel="key j", title=", ".join(title), xticks=range(0, 24, 8))
axes[0].set_ylabel("query p")
assert ((weights > 0).sum(axis=1) <= 8).all() and (alibi_slopes(8) == 0.5 ** np.arange(1, 9)).all()
drawn

# %% [markdown]
# ## Tile by tile
#
# FlashAttention walks over the keys in tiles, with a running softmax, and that does not care where scores come from. So
# `flash_attention` is the loop of the chapter before, with `modified_scores` in it. Here are the model's own queries,
# keys and values, with everything switched on at once (`cu_q` are offsets of texts in one row, of which more below).
# Whatever the tiles, the result is that of the definition, `attention`, which has all scores in memory.

# %%
q, k, v = (x.astype(np.float64) for x in record_attention(lab, lab.validation[:1])[-1])
everything = flash_variants.variants(q.shape[1], q.shape[2])["all"]
print(*everything, sep=", ")
out, lse = attention(q, k, v, **everything)
for block_q, block_k in ((16, 16), (7, 50), (1, 128)):
    tiled = flash_attention(q, k, v, **everything, block_q=block_q, block_k=block_k)
    np.testing.assert_allclose(tiled[0], out, atol=1e-12)
    np.testing.assert_allclose(tiled[1], lse, atol=1e-12)

# %% [markdown]
# In the backward pass only the cap shows: its derivative is 1 − tanh². A bias is a constant, and a hidden score had no
# weight. To see that the gradient is right, move one number of q, k or v a little and compute the result again:

# %%
dout = np.random.default_rng(0).normal(size=q.shape)
dq, dk, dv = flash_attention_backward(dout, q, k, v, out, lse, **everything)
for x, gradient in ((q, dq), (k, dk), (v, dv)):
    step = np.zeros_like(x)
    step[0, 1, 90, 3] = 1e-5
    moved = [x_ + step if x_ is x else x_ for x_ in (q, k, v)]
    back = [x_ - step if x_ is x else x_ for x_ in (q, k, v)]
    difference = attention(*moved, **everything)[0] - attention(*back, **everything)[0]
    np.testing.assert_allclose((difference * dout).sum() / 2e-5, gradient[0, 1, 90, 3], atol=1e-7)

# %% [markdown]
# ## Tiles that nobody visits
#
# A window does more than hide. For a tile of queries the keys that any of them sees are one run, from the first query's
# leftmost to the last one's rightmost, and `query_tiles` says which. `order_of_tiles` numbers the tiles as they are
# visited, for 512 queries and keys in tiles of 32.


# %%
def order_of_tiles(window):
    """The step in which each tile is visited, from 1 on, NaN where it never is."""
    found, step = np.full((16, 16), np.nan), 0
    for rows, seen, _ in query_tiles(spans(512, 512), *reach(True, (window and window - 1, None)), 32):
        for columns in runs(seen.start // 32 * 32, seen.stop, 32):
            step += 1
            found[rows.start // 32, columns.start // 32] = step
    return found


# %% [markdown]
# With all keys the number of tiles grows with the square of the length, with a window it grows with the length. Grey
# tiles are never loaded. A window of 96 tokens is as long as three tiles: how many tiles will a row visit? Live, choose
# another window.


# %%
def visited(window=96):
    tiles = order_of_tiles(window)
    drawn, axes = figure(width=4.4, height=3.0)
    heatmap(axes, tiles, "step", limit=1.4 * np.nanmax(tiles))
    title = f"{np.isfinite(tiles).sum()} of {np.isfinite(order_of_tiles(None)).sum()} tiles are loaded"
    axes.set(xlabel="tile of keys", ylabel="tile of queries", title=title)
    return drawn


explore(visited, window=[32, 96, 224, None])

# %% [markdown]
# Four: the window of a tile's first query just reaches into the third tile to the left. As numbers:

# %%
assert np.isfinite(order_of_tiles(None)).sum() == 136 and np.isfinite(order_of_tiles(96)).sum() < 64
assert np.isfinite(order_of_tiles(96)).sum(axis=1).max() == 4

# %% [markdown]
# In bytes, for a layer of Llama-3-8B: what passes between the GPU's memory and its chip, by `hbm_bytes`. Each window
# has a length from which on it pays, its own, and then the bytes double with the text, no more.

# %%
drawn, axes = figure(height=2.5)
texts = [2**n for n in range(9, 17)]
for window, role in ((None, "baseline"), (4096, "method"), (512, "second")):
    reached = (window and window - 1, None)
    moved = [flash_variants.hbm_bytes((1, 32, n, 128), (1, 8, n, 128), 128, True, reached) / 1e9 for n in texts]
    axes.loglog(texts, moved, **series(role), label=f"window {window:,}" if window else "all keys")
axes.set(xlabel="tokens", ylabel="GB moved", title="past its window a text costs in proportion")
legend(axes)
assert moved[-1] / moved[-2] < 2.05
drawn

# %% [markdown]
# ## End to end in one row
#
# Back to the padding. Put the texts end to end instead: linear layers and norms see single tokens and do not care whose
# they are. Attention is told by offsets: sequence n has the tokens from cu[n] up to cu[n + 1], that one not included.
# Which query sees which key (yellow) is then a picture of triangles, here with a window of 16 tokens as well, which
# cuts the longer ones to bands. A tile has keys of one sequence only. What lies outside is neither computed nor stored.

# %%
few = [20, 7, 0, 33, 12]
drawn, axes = figure(width=3.4, height=3.2)
axes.imshow(variant_measures.pairs(few, 16), cmap="cividis", interpolation="nearest")
axes.grid(False)
axes.set(xlabel="key", ylabel="query", title="nobody sees another's text")
drawn

# %% [markdown]
# Positions count within each sequence, and its last query stands at its last key. So one row may hold whole prompts,
# pieces of others, and single new tokens with the keys of all that came before: that is how servers mix prefill and
# decoding. Attention to the packed row is attention to each text alone:

# %%
ends = np.cumsum([0, *few])
whole = np.concatenate([x[:, :, :72] for x in (q, k, v)])
for a, b in pairwise(ends):
    if b > a:
        alone = attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])[0]
        packed = flash_attention(*whole[:, None], cu_q=ends)[0]
        np.testing.assert_allclose(packed[:, :, a:b], alone, atol=1e-12)

# %% [markdown]
# ## In the model
#
# The chapter's claim puts it all together: bytes by the formula, time of the torch code on this CPU, the whole model
# over padded and packed texts, prompts continued packed and alone, and rounding errors of both passes in float32. On
# the left, milliseconds as the text doubles: which line gets straight and flat? On the right, what packing leaves.

# %%
claim = flash_variants.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# With a window the time of a doubled text nears the double, without one the fourfold. The times are a CPU's and those
# of this machine: they show how costs grow, not how fast a GPU is. How much packing saves depends on the lengths alone.
# As ranges:

# %%
assert claim.holds
assert claim.numbers["tokens, packed"] < 0.7 * claim.numbers["tokens, padded"]
assert claim.numbers["difference of logits, packed"] < 1e-4
assert claim.numbers["error over that of whole rows"] <= 2

# %% [markdown]
# ## The kernel
#
# Options that are off are compiled away. The loop over keys is cut: tiles that the window's edges cross are masked,
# those between are not. And a program, which computes a tile of queries, must find out whose. With tiles of B queries,
# sequence n gets the tile numbers from
# cu[n] // B + n on. That leaves room for all of its tiles and at most one spare, so a program searches the offsets,
# and neither a list of tiles nor the longest length is needed.

# %%
B, cu = 16, np.cumsum([0, *lengths])
first = cu // B + np.arange(17)
needed = -(-np.diff(cu) // B)
assert (np.diff(first) >= needed).all() and (np.diff(first) <= needed + 1).all()
grid, longest = first[-1], 16 * -(-max(lengths) // B)
print(f"{needed.sum()} tiles of {B} queries, {grid} programs; a grid over the longest would have {longest}")

# %% [markdown]
# What is the least that such a kernel may take on an H200? As long as q, k, v and the output need to pass through
# memory once, or as long as the products of the pairs in the windows take; the longer of the two. Even with windows
# that is the products:

# %%
gpu = hardware.GPUS["H200"]
for case in CASES[:5]:
    print(f"{case.name:44} {case.bytes / 1e6:4.0f} MB: {1e6 * case.bytes / gpu.bandwidth:3.0f} µs, "
          f"{case.operations / 1e9:4.0f} GFLOP: {1e6 * case.operations / gpu.bf16:4.0f} µs")  # fmt: skip
    assert case.operations / gpu.bf16 > case.bytes / gpu.bandwidth

# %% [markdown]
# The machine code for an H100 or H200 (sm_90): tensor-core instructions, no spilled registers, whatever is switched on.

# %%
report = check.static_report("attention.flash_variants", [90])
for row in report:
    if row["kernel"] != "delta_kernel":
        print(f"{row['case']:44} {row['kernel']:21} {row['registers']:3} registers, "
              f"{row['spill_bytes']} bytes spilled, {row['tensor_instructions']}")  # fmt: skip
assert len({row["case"] for row in report}) == len(CASES)
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's FlexAttention and flash-attn:

# %%
for row in bench.recorded("attention.flash_variants"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.flash_variants"):
    print("not recorded yet: python -m kernels bench attention.flash_variants, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests leave to you: what happens to a score, both passes of the reference, and the inner loops of the kernels.
#
# ```
# python -m chapters exercise flash_variants --to my
# python -m pytest --submission my tests/attention/test_flash_variants.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["flash_variants"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["flash_variants"])) == 5
