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
from chapters.figures import COLOURS, figure, legend, series
from chapters.lab import Lab
from kernels import bench, cases, check, hardware
from kernels.attention import heads as kernel
from minitfm.cache import KVCache

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# The sizes of Llama-2-70B: 80 layers, 64 query heads of 128 channels. Thirty-two texts are written together, in 16
# bits. What passes through memory for one token, against the length of the texts, if every query head had keys and
# values of its own, if eight share one (as they do in that model), and if all 64 share one:

# %%
lengths = [2**n for n in range(8, 15)]
drawn, axes = figure(height=2.8)
for count, role in ((64, "baseline"), (8, "method"), (1, "second")):
    moved = [heads.decode_bytes(69_000_000_000, 80, count, 128, n, batch=32) / 1e9 for n in lengths]
    axes.plot(lengths, moved, **series(role), label=f"{count} key/value heads")
axes.loglog(base=2)
axes.set(xlabel="tokens of each text", ylabel="GB per token", title="weights are the flat part")
legend(axes)
assert heads.cache_bytes(80, 64, 128, 4096) > 10e9 and heads.cache_bytes(80, 8, 128, 4096) < 1.4e9
drawn

# %% [markdown]
# At a few hundred tokens nothing but the weights counts. Then the cache takes over, the later the fewer heads it has.
# It takes over room, too: with 64 heads, one text of 4,096 tokens holds more than 10 GB.
#
# ## The idea
#
# Query head h reads the keys and values of head h // (H / Hkv): neighbours share. With Hkv = H that is multi-head
# attention, with Hkv = 1 multi-query attention. Nothing else changes, so one function is enough for all three:

# %%
rng = np.random.default_rng(0)
q = rng.normal(size=(1, 8, 5, 16))
for count in (8, 2, 1):
    k, v = rng.normal(size=(2, 1, count, 5, 16))
    everyone = heads.grouped_attention(q, *(np.repeat(x, 8 // count, axis=1) for x in (k, v)))
    np.testing.assert_allclose(heads.grouped_attention(q, k, v), everyone, atol=1e-12)

# %% [markdown]
# Which query head hears which key head? Change the values of one key head, and see whose output moves: of 8 query
# heads, the first four read the first of 2, the others the second.

# %%
k, v = rng.normal(size=(2, 1, 2, 5, 16))
heard = np.zeros((2, 8), dtype=int)
for head in range(2):
    louder = v.copy()
    louder[:, head] += 1
    change = heads.grouped_attention(q, k, louder) - heads.grouped_attention(q, k, v)
    heard[head] = np.abs(change).max(axis=(0, 2, 3)) > 0
assert heard.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
heard

# %% [markdown]
# ## Positions
#
# Before queries and keys meet, pairs of their channels are turned by angles that grow with the position. A score then
# depends on how far two tokens lie apart, not on where they stand. Keys are turned once, when they are cached.

# %%
cos, sin = heads.rotary_tables(64, 16)
same = np.ones((64, 16))
for layout in heads.LAYOUTS:
    turned = heads.rotate(same, cos, sin, layout)
    scores = turned @ turned.T
    np.testing.assert_allclose(np.diag(scores, -5), scores[5, 0], atol=1e-12)
drawn, axes = figure(height=2.4)
axes.plot(scores[:, 0], **series("method"))
axes.set(xlabel="distance of two equal tokens", ylabel="score")
drawn

# %% [markdown]
# Two conventions are in use: a pair is (i, i + D/2), or (2i, 2i + 1). Whoever loads one with code for the other gets
# nonsense and no error. They are the same after a permutation of the channels, exactly:

# %%
x, order = rng.normal(size=(64, 16)), heads.half_split_order(16)
inside = heads.rotate(x, cos, sin, "interleaved")
assert np.array_equal(heads.rotate(x[:, order], cos, sin, "half"), inside[:, order])
assert np.abs(heads.rotate(x, cos, sin, "half") - inside).max() > 0.1, "nonsense, and no error"
order

# %% [markdown]
# ## A trained model, converted
#
# Our base model has a key/value head for each of its query heads. To take some away, `pool_heads` averages the
# projections of those that are to become one. The cache shrinks by exactly the ratio of the heads, measured here on
# caches that a model has filled:

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
# But the heads had learned different things, and their mean is none of them. How different? Here is how much of the
# keys' projections is left after averaging, in each layer, if the heads were alike: 1; if they had nothing in common:
# 1 / √Hkv. It is close to the latter in every layer.

# %%
left = []
for block in lab.model().blocks:
    weight = block.attention.k_proj.weight.detach().double().numpy()
    pooled = heads.pool_heads(weight, most, 1)
    left.append(np.linalg.norm(pooled) / (np.linalg.norm(weight) / np.sqrt(most)))

# %% [markdown]
# Heads that had something in common would keep more of their norm than four that point anywhere.

# %%
drawn, axes = figure(height=2.2)
axes.bar([str(i) for i in range(len(left))], left, color=COLOURS["method"])
axes.axhline(most**-0.5, **{**series("reference"), "marker": ""}, label="nothing in common")
axes.set(xlabel="layer", ylabel="norm that is left", ylim=(0, 1))
legend(axes)
assert all(abs(share - most**-0.5) < 0.15 for share in left)
drawn

# %% [markdown]
# ## Uptraining
#
# So pooling breaks the model, and the paper trains it a little more. This is the chapter's claim. The quick version
# takes a few dozen steps, the recorded one 5% of the base model's. The unpooled model gets the same steps: what is won
# back is measured against it as it came or as it then is, whichever is better.

# %%
claim = heads.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# More than half of what pooling broke comes back, and the order is the paper's: fewer heads, smaller cache, higher
# perplexity.

# %%
after = [claim.numbers[f"perplexity, {count} kv heads, trained"] for count in heads.sweep(most)]
assert claim.holds and after == sorted(after)
assert all(0.5 < claim.numbers[f"share of the loss won back, {n} kv heads"] < 1 for n in heads.sweep(most)[1:])

# %% [markdown]
# ## Texts of different lengths, decoded together
#
# A server writes many texts at once, and each is at another position. `rope_append` therefore takes a position for each
# sequence: it cuts the projection into q, k and v, turns q and k, and puts k and v where that sequence's cache ends.
# `decode_step` uses it in the model. Three texts of 5, 20 and 60 tokens get their next logits in one step:

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
axes.set(xlabel="least microseconds on an H200")
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
