# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # MHA, GQA, MQA: how many heads have to be remembered?
#
# To write one token, a model reads all its weights, and the keys and values of all tokens before. Several texts that
# are written together share the weights. They do not share the keys and values: each has its own cache, and it grows
# with every token. This notebook shrinks it by letting several query heads read the same keys and values, first on
# paper, then in a trained model that never expected it.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import heads
from chapters.explore import explore
from chapters.figures import COLOURS, figure, legend, panels, series
from chapters.lab import Lab
from kernels import bench, cases, check, hardware
from kernels.attention import heads as kernel
from minitfm.cache import KVCache

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Take the sizes of Llama-2-70B: 69 billion weights, 80 layers, 64 query heads of 128 channels, all numbers in 16 bits.
# For each token the weights pass through memory once for all texts, and the cache of each text once. A cache holds a
# key and a value, in each layer, for each of its heads. With as many of them as there are query heads, one text of
# 4,096 tokens fills more than 10 GB; with 8, as in that model, an eighth of it.

# %%
lengths = [2**n for n in range(8, 15)]
labels = [f"{n:,}" for n in lengths]
assert heads.cache_bytes(80, 64, 128, 4096) > 10e9 and heads.cache_bytes(80, 8, 128, 4096) < 1.4e9


def gigabytes(count, texts):
    """What passes through memory for one token, for each length, with `count` key/value heads."""
    return [heads.decode_bytes(69_000_000_000, 80, count, 128, n, batch=texts) / 1e9 for n in lengths]


# %% [markdown]
# Thirty-two texts are written together. Where do the curves leave the dashed line, the weights' share?


# %%
def passing(texts=32):
    drawn, axes = figure(height=2.8)
    axes.axhline(2 * 69 / texts, **series("reference"), label="weights alone")
    for count, role in ((64, "baseline"), (8, "method"), (1, "second")):
        axes.loglog(lengths, gigabytes(count, texts), base=2, **series(role), label=f"key/value heads: {count}")
    axes.set(xlabel="tokens of each text", ylabel="GB per token", xticks=lengths, xticklabels=labels)
    axes.set_title("few key/value heads put the cache off")
    axes.yaxis.set_major_formatter("{x:g}")
    legend(axes)
    return drawn


# %% [markdown]
# Each curve is weights plus cache.

# %%
explore(passing, texts=[1, 8, 32, 128])

# %% [markdown]
# At a few hundred tokens nothing but the weights counts. Then the cache takes over, the later the fewer heads it has.
# Turn the knob where the notebook is live: a single text waits mostly for the weights; the more texts share them, the
# sooner the caches are what everything waits for. That is why servers, which batch, care most about heads.
#
# ## The idea
#
# Let there be H query heads and Hkv heads of keys and values, and let neighbours share: query head h reads the keys
# and values of head h // (H / Hkv). With Hkv = H that is multi-head attention (MHA), with Hkv = 1 multi-query attention
# (MQA), between them grouped-query attention (GQA). Nothing else changes. Below, 8 query heads and 8, 2 or 1 of the
# others give what attention gives if each key/value head is copied for everyone who reads it:

# %%
rng = np.random.default_rng(0)
q = rng.normal(size=(1, 8, 5, 16))
for count in (8, 2, 1):
    k, v = rng.normal(size=(2, 1, count, 5, 16))
    everyone = heads.grouped_attention(q, *(np.repeat(x, 8 // count, axis=1) for x in (k, v)))
    np.testing.assert_allclose(heads.grouped_attention(q, k, v), everyone, atol=1e-12)

# %% [markdown]
# Which query head hears which key/value head? Change the values of one of them, and see whose output moves. With 2 of
# them, whom will the first one reach: every other query head, or the first four?


# %%
def listeners(count):
    """1 where a query head's output (column) moves with a key/value head's values (row), else 0."""
    k, v = rng.normal(size=(2, 1, count, 5, 16))
    before, heard = heads.grouped_attention(q, k, v), np.zeros((count, 8))
    for head in range(count):
        louder = v + (np.arange(count) == head)[:, None, None]
        heard[head] = np.abs(heads.grouped_attention(q, k, louder) - before).max(axis=(0, 2, 3)) > 0
    return heard


# %% [markdown]
# Yellow: this query head reads that key/value head. Live, choose their number: 8 give the diagonal of multi-head
# attention, 1 the full row of multi-query attention.


# %%
def who_reads_whom(count=2):
    drawn, axes = figure(width=5.0, height=1.5 + 0.25 * count)
    axes.imshow(listeners(count), cmap="cividis", aspect="auto")
    axes.grid(False)
    axes.set(xlabel="query head", ylabel="key/value head", title="neighbours share", yticks=range(count))
    return drawn


assert listeners(2).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
explore(who_reads_whom, count=[8, 4, 2, 1])

# %% [markdown]
# ## Positions
#
# Before queries and keys meet, both are turned (rotary embedding, RoPE): the D channels of a head are taken in D / 2
# pairs, and at position p pair i is turned, as a point in the plane, by the angle p · 10000^(−2i / D). When two turned
# vectors are multiplied, only the difference of their angles counts. So a score depends on how far two tokens lie
# apart, not on where they stand: all entries of `scores` along a diagonal are equal. Keys are turned once, when they
# are cached.

# %%
cos, sin = heads.rotary_tables(64, 16)
same = np.ones((64, 16))
for layout in heads.LAYOUTS:
    turned = heads.rotate(same, cos, sin, layout)
    scores = turned @ turned.T
    np.testing.assert_allclose(np.diag(scores, -5), scores[5, 0], atol=1e-12)

# %% [markdown]
# On the left the cosines: the first pair turns around every six tokens, the last hardly at all. On the right what that
# does to the score of two equal tokens. The slow pairs make it fall with the distance, the fast ones add the waves.

# %%
drawn, (left, right) = panels(2, width=8.0, height=2.6)
drawn.colorbar(left.imshow(cos.T, cmap="cividis", aspect="auto"), ax=left, label="cosine")
left.grid(False)
left.set(xlabel="position", ylabel="pair of channels", title="fast and slow pairs")
right.plot(scores[:, 0], **series("method") | {"marker": ""})
right.set(xlabel="distance of two equal tokens", ylabel="score", title="nearer counts more, in waves")
assert scores[0, 0] == scores[:, 0].max()
drawn

# %% [markdown]
# Two conventions are in use: a pair is (i, i + D/2), or (2i, 2i + 1). Whoever loads one with code for the other gets
# nonsense and no error. They are the same after a permutation of the channels, exactly. It is the last line:

# %%
x, order = rng.normal(size=(64, 16)), heads.half_split_order(16)
inside = heads.rotate(x, cos, sin, "interleaved")
assert np.array_equal(heads.rotate(x[:, order], cos, sin, "half"), inside[:, order])
assert np.abs(heads.rotate(x, cos, sin, "half") - inside).max() > 0.1, "nonsense, and no error"
order

# %% [markdown]
# ## A trained model, converted
#
# Our base model has a key/value head for each of its query heads. To take some away, `pool_heads` averages the rows of
# the key and value matrices of those that are to become one. The cache shrinks by exactly the ratio of the heads. Here
# are the bytes per token of caches that a model has filled, by the number of heads:

# %%
most = lab.config.kv_heads
models = {count: heads.group_heads(lab.model(), count) for count in heads.sweep(most)}
held = {}
for count, model in models.items():
    cache = KVCache(model.config)
    with torch.no_grad():
        model(lab.validation[:1], cache)
    held[count] = cache.nbytes() // len(cache)
assert all(held[count] * most == held[most] * count for count in held)
held

# %% [markdown]
# But is the mean of some heads still like any of them? It depends on what they have in common. Four vectors that point
# the same way have a mean as long as they are; of four that are perpendicular, half of the length is left, 1 / √4.
# Below, this for the key matrices of all heads of a layer, averaged into one. What do you expect of a trained model?

# %%
left = []
for block in lab.model().blocks:
    weight = block.attention.k_proj.weight.detach().double().numpy()
    pooled = heads.pool_heads(weight, most, 1)
    left.append(np.linalg.norm(pooled) / (np.linalg.norm(weight) / np.sqrt(most)))

# %% [markdown]
# The heads have learned different things: in every layer no more is left than of vectors that have nothing in common.

# %%
drawn, axes = figure(height=2.4)
axes.bar([str(i) for i in range(len(left))], left, color=COLOURS["method"])
axes.axhline(1, color=COLOURS["muted"], label="all alike")
axes.axhline(most**-0.5, **series("reference") | {"color": COLOURS["accent"]}, label="nothing in common")
axes.set(xlabel="layer", ylabel="share of norm left", ylim=(0, 1.1), title="the mean of the heads is like none of them")
legend(axes, loc="center", bbox_to_anchor=(0.5, 0.68), ncols=2)
assert all(abs(share - most**-0.5) < 0.15 for share in left)
drawn

# %% [markdown]
# ## Uptraining
#
# So pooling breaks the model, and the paper trains it a little more. This is the chapter's claim. The quick version
# takes a few dozen steps, the recorded one 5% of the base model's. The unpooled model gets the same steps: what is won
# back is measured against it as it came or as it then is, whichever is better. How much of the damage will a few dozen
# steps repair: a tenth, a half, nearly all?

# %%
claim = heads.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# More than half of what pooling broke comes back, and the order is the paper's: fewer heads, smaller cache, higher
# perplexity. (The unpooled model, at the right end, gets a little worse: so few steps at such a rate disturb it first.)
# The figure does not say that grouped heads must cost that much. A model that is trained with them from the start, as
# Llama-2-70B was, loses far less.

# %%
after = [claim.numbers[f"perplexity, {count} kv heads, trained"] for count in heads.sweep(most)]
assert claim.holds and after == sorted(after)
assert all(0.5 < claim.numbers[f"share of the loss won back, {n} kv heads"] < 1 for n in heads.sweep(most)[1:])

# %% [markdown]
# ## Texts of different lengths, decoded together
#
# A server writes many texts at once, and each is at another position. `rope_append` therefore takes a position for each
# sequence: it cuts what the input projection gave into q, k and v, turns q and k, and puts k and v where that
# sequence's cache ends. `decode_step` uses it in the model. Below, three texts of 5, 20 and 60 tokens share each step,
# and each gets the logits that it gets alone:

# %%
model, tokens, lengths = models[most], lab.validation[:3], torch.tensor([5, 20, 60])
shape = (lab.config.layers, 3, most, 64, lab.config.head_dim)
k_cache, v_cache = torch.zeros(shape), torch.zeros(shape)
for step in range(60):  # texts that are complete write the same position again
    at = torch.minimum(torch.tensor(step), lengths - 1)
    logits = heads.decode_step(model, tokens[torch.arange(3), at], k_cache, v_cache, at)
for row, length in enumerate(lengths):
    alone = model(tokens[row : row + 1, :length])[0, -1]
    torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## The kernel, in bytes
#
# One operator after the other moves each number of q and k ten times for its rotation, and those of k and v twice more
# on their way into the cache. The kernel reads the projection once and writes q, k and v once, each to its last place.
# For one Llama-3-8B layer, 8,192 new tokens:

# %%
sizes = {
    "one operator after the other": kernel.naive_bytes(8192, 32, 8, 128),
    "fused": kernel.floor_bytes(8192, 32, 8, 128),
}
gpu = hardware.GPUS["H200"]
drawn, axes = figure(height=1.5)
axes.barh(list(sizes), [1e6 * size / gpu.bandwidth for size in sizes.values()], color=COLOURS["method"])
axes.set(xlabel="least time on an H200, µs", title=f"{sizes['fused'] / 1e6:.0f} MB, and 4.5 times as much")
assert sizes["one operator after the other"] == 4.5 * sizes["fused"]
drawn

# %% [markdown]
# What the compiler makes of it for an H100 or H200 can be seen without one: loads and stores of 128 bits, in both
# layouts, and no spilled registers.

# %%
report = check.static_report("attention.heads", [90])
for row in report:
    print(f"{row['case']:36} {row['registers']:3} registers, {row['load_bits']}-bit loads, {row['store_bits']}-bit "
          f"stores, {row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report) and len(report) == len(cases.cases("attention.heads"))

# %% [markdown]
# And timed on a GPU, beside plain torch:

# %%
for row in bench.recorded("attention.heads"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("attention.heads"):
    print("not recorded yet: python -m kernels bench attention.heads, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: grouped attention, both rotations, pooling, the append, and its kernel.
#
# ```
# python -m chapters exercise heads --to my
# python -m pytest --submission my tests/attention/test_heads.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["heads"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["heads"])) == 5
