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
from chapters.figures import COLOURS, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.shared import variant_measures
from chapters.shared.decode_measures import record_attention
from chapters.shared.visible_tiles import query_tiles, reach, runs, spans
from kernels import bench, check
from kernels.attention.flash_variants import CASES

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Sixteen requests, as long as people's are. A batch is a rectangle, so all of them become as long as the longest: the
# model computes the orange part as well, and throws it away. With attention it is worse, because it counts squares.

# %%
lengths = sorted(variant_measures.draw_lengths(lab, 0))
drawn, axes = figure(height=2.4)
axes.bar(range(16), [max(lengths)] * 16, color=COLOURS["baseline"], label="padding")
axes.bar(range(16), lengths, color=COLOURS["method"], label="tokens")
axes.set(xlabel="request", ylabel="positions")
legend(axes, loc="upper left")
assert sum(lengths) < 0.6 * 16 * max(lengths)
drawn

# %% [markdown]
# ## One score at a time
#
# Three things may happen to a score x of a query and a key. A soft cap bends it: c tanh(x / c) stays within ±c, and is
# nearly x where x is small. ALiBi takes off m |j − p|, where p is the query's own place among the keys. A mask makes it
# −∞. The order matters: a cap that came last would make a number of −∞. `modified_scores` does all three.

# %%
x = np.linspace(-12, 12, 49)
drawn, axes = figure(width=4.4, height=2.4)
for cap, slope, role in ((None, None, "reference"), (5.0, None, "method"), (5.0, 0.5, "accent")):
    changed = flash_variants.modified_scores(x[None], np.full((1, 49), -4), 4, 0, cap, slope)[0]
    label = "as it is" if cap is None else "cap 5" if slope is None else "cap 5, slope ½, 4 keys away"
    axes.plot(x, changed, **series(role) | {"marker": ""}, label=label)
axes.set(xlabel="score", ylabel="what the softmax gets", ylim=(-12, 22))
legend(axes)
drawn

# %% [markdown]
# A window (left, right) counts the keys besides the one at p, as flash-attn counts; where a paper says "a window of W
# tokens", it is (W − 1, 0). The slopes of ALiBi halve, from head to head:

# %%
hidden = flash_variants.modified_scores(np.zeros((1, 25)), np.arange(-24, 1)[None], 16, 0)[0]
assert np.isneginf(hidden[:8]).all() and (hidden[8:] == 0).all()
assert (alibi_slopes(8) == 0.5 ** np.arange(1, 9)).all()

# %% [markdown]
# ## Tile by tile
#
# The running softmax does not care where scores come from. So `flash_attention` is the loop of the chapter before, with
# `modified_scores` in it. Here are the model's own queries, keys and values, with everything switched on at once.

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
# Going back, only the cap shows: its derivative is 1 − tanh². A bias is a constant, and a hidden score had no weight.
# A number moved a little and the result computed again says whether the gradient is right:

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
# leftmost to the last one's rightmost, and `query_tiles` says which. Below, 512 queries and keys in tiles of 32, with a
# window of 96 tokens. Grey tiles are never loaded.


# %%
def order_of_tiles(window):
    """How many tiles came before this one, NaN where none came."""
    found, step = np.full((16, 16), np.nan), 0
    for rows, seen, _ in query_tiles(spans(512, 512), *reach(True, window), 32):
        for columns in runs(seen.start // 32 * 32, seen.stop, 32):
            step += 1
            found[rows.start // 32, columns.start // 32] = step
    return found


# %% [markdown]
# With all keys the number of tiles grows with the square of the length, with a window it grows with the length:

# %%
drawn, axes = figure(width=4.2, height=3.0)
everywhere, windowed = order_of_tiles((None, None)), order_of_tiles((95, None))
heatmap(axes, windowed, "step")
axes.set(xlabel="tile of keys", ylabel="tile of queries")
assert np.isfinite(everywhere).sum() == 136 and np.isfinite(windowed).sum() < 64
drawn

# %% [markdown]
# In bytes, for a layer of Llama-3-8B: what passes between the GPU's memory and its chip, by `hbm_bytes`. Each window
# has a length from which on it pays, and then the bytes double with the text, no more.

# %%
drawn, axes = figure(width=4.6, height=2.4)
texts = [2**n for n in range(9, 17)]
for left, label, role in ((None, "all keys", "baseline"), (4095, "4,096", "method"), (511, "512", "second")):
    moved = [flash_variants.hbm_bytes((1, 32, n, 128), (1, 8, n, 128), 128, True, (left, None)) / 1e9 for n in texts]
    axes.plot(texts, moved, **series(role), label=label)
axes.loglog()
axes.set(xlabel="tokens", ylabel="GB moved")
legend(axes)
assert moved[-1] / moved[-2] < 2.05
drawn

# %% [markdown]
# ## End to end in one row
#
# Linear layers and norms see single tokens and do not care whose they are. Attention is told by offsets: sequence n has
# the tokens cu[n] to cu[n + 1]. Which query sees which key is then a picture of triangles, here with a window of 16
# tokens as well, and a tile has keys of one sequence only. What lies outside is neither computed nor stored.

# %%
few = [20, 7, 0, 33, 12]
drawn, axes = figure(width=4.2, height=3.0)
heatmap(axes, variant_measures.pairs(few, 16).astype(float), "sees", limit=1)
axes.set(xlabel="key", ylabel="query")
drawn

# %% [markdown]
# Every sequence has a place p of its own, aligned at its bottom right. So one row may hold whole prompts, pieces of
# others, and single new tokens with the keys of all that came before: that is how servers mix prefill and decoding.

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
# over padded and packed texts, prompts continued packed and alone, and rounding errors of both passes in float32.

# %%
claim = flash_variants.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
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
# those between are not. And a program must find out whose tile it has. Sequence n gets the tile numbers from
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
