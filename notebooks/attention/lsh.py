# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # LSH attention: find the keys that matter by sorting
#
# Attention computes a score for every pair of tokens, and then the softmax throws most of them away. If one knew
# beforehand which keys point where a query points, one could compute those scores alone. Reformer finds them with a
# random hash: vectors that are close fall into one bucket, and sorting by bucket makes them neighbours. This notebook
# looks at how much of the attention that finds, round by round, and what it costs.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import lsh
from chapters.explore import explore
from chapters.figures import figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.shared.hashed_attention import LshAttend, exact_attend
from kernels import bench, cases, check, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
D = lab.config.head_dim

# %% [markdown]
# ## What hurts
#
# Reformer uses one projection for queries and keys: a token's query is its key. Here are the real model's keys of one
# text, used so. Sort each query's weights by size: how much of the softmax do its largest few hold?

# %%
seen = []
model = lab.model(attend=lambda q, k, v: seen.append(k) or exact_attend(q, k, v))
with torch.no_grad():
    model(lab.validation[:2])
keys = [k.double().numpy() for k in seen]
at = np.broadcast_to(np.arange(keys[0].shape[2]), keys[0].shape[:3])
scores = lsh.shared_scores(keys[-1], at, at, 1.0)[:, :, 64:]
scores = np.where(np.tri(128, dtype=bool)[64:], scores, -np.inf)
weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

# %% [markdown]
# In the last layer, and for queries that see 64 keys or more:

# %%
largest = -np.sort(-weights, axis=-1)
drawn, axes = figure(width=5.0, height=2.5)
axes.plot(range(1, 65), largest.cumsum(-1).mean((0, 1, 2))[:64], **series("method") | {"marker": ""}, label="largest")
axes.plot([1, 64], [1 / 96, 64 / 96], **series("muted"), label="any")
axes.set(xlabel="keys", ylabel="share of the softmax", ylim=(0, 1))
legend(axes)
assert largest[..., :16].sum(-1).mean() > 2 * 16 / 96
drawn

# %% [markdown]
# ## A hash that keeps neighbours together
#
# Rotate a vector at random and note which axis it then lies closest to, and on which side: that is its bucket. No
# distance is computed. Two vectors at a small angle nearly always share it, opposite ones never.

# %%
rotations = np.random.default_rng(0).normal(size=(D, 2000, 8))
angles = np.linspace(0, np.pi, 13)
pairs = np.zeros((13, 2, D))
pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 1, 1] = 1, np.cos(angles), np.sin(angles)
shared = [np.mean(np.equal(*lsh.hash_buckets(pair, rotations).T)) for pair in pairs]
drawn, axes = figure(width=5.0, height=2.4)
axes.plot(np.degrees(angles), shared, **series("method"))
axes.set(xlabel="angle, degrees", ylabel="share one of 16 buckets")
assert shared[0] == 1 and shared[-1] == 0 and all(np.diff(shared) <= 0.02)
drawn

# %% [markdown]
# ## Sort, cut, attend
#
# Buckets are of all sizes, which no GPU likes. So the tokens are sorted by bucket and cut into chunks of one size;
# each token attends to its own chunk and the one before. One round is `argsort` and a reshape.

# %%
rounds, chunk = 1, 8
drawn_rotations = np.random.default_rng(1).normal(size=(D, rounds, 8))
buckets = lsh.hash_buckets(keys[0], drawn_rotations)
first = next(lsh.chunk_pairs(buckets, chunk))
print("tokens of the first chunk:", first[1][0, 0], "\ntheir buckets:", buckets[0, 0, 0][first[1][0, 0]])
assert (np.diff(buckets[0, 0, 0][first[1][0, 0]]) >= 0).all()

# %% [markdown]
# Which pairs meet? Each row of the picture is a query, each column a key, and colour counts the rounds in which they
# met. More rounds fill it in, first where vectors are close. "none" hashes nothing: all tokens fall into one bucket,
# the sorted order is that of the text, and a chunk is a window.


# %%
def drawn_meetings(rounds=4, hashes="lsh"):
    """How often each of 64 queries meets each key before it, in one head of the first layer."""
    found = LshAttend(rounds, 8, hashes).buckets(torch.from_numpy(keys[0])).numpy()
    drawn, axes = figure(width=4.0, height=2.8)
    heatmap(axes, lsh.times_seen(found, 8)[0, 0, :64, :64], "meetings")
    return drawn


explore(drawn_meetings, rounds=[1, 2, 8], hashes=["lsh", "none"])

# %% [markdown]
# ## Merge
#
# Every round leaves an output and the log of its sum of exponentials, and that is all a merge needs, as between the
# runs of Flash-Decoding. With repeats taken out, the result is exactly attention to the union of what was seen:

# %%
k, v = keys[0], np.random.default_rng(2).normal(size=keys[0].shape)
buckets = LshAttend(4, 8).buckets(torch.from_numpy(k)).numpy()
out, _ = lsh.lsh_attention(k, v, buckets, 8, dedup=True)
union = lsh.times_seen(buckets, 8) > 0
everything, _ = lsh.attend_visible(lsh.shared_scores(k, at, at, D**-0.5), union, v)
np.testing.assert_allclose(out, everything, atol=1e-9)
print(f"4 rounds see {union.sum() / np.broadcast_to(np.tri(128), union.shape).sum():.0%} of the pairs")

# %% [markdown]
# And with one bucket and a chunk for all, nothing is approximated at all:

# %%
alone = np.zeros_like(buckets[:, :, :1])
np.testing.assert_allclose(lsh.lsh_attention(k, v, alone, 128)[0], lsh.shared_attention(k, v)[0], atol=1e-12)

# %% [markdown]
# ## What it finds
#
# The claim trains the base model on for some steps with its keys as queries, which costs perplexity by itself, and
# then puts LSH in place of exact attention. Two controls: random buckets, to see what the hash is worth, and windows
# of the same chunks, to see what sorting is worth.

# %%
claim = lsh.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# More rounds find more, and the hash finds far more than chance. But on text of this length the window is a strong
# rival for the price of one round: most of what a token needs stands just before it. LSH pays where it does not.

# %%
numbers = claim.numbers
assert numbers["mass, lsh, rounds 1"] < numbers["mass, lsh, rounds 8"]
assert numbers["mass, lsh, rounds 2"] > numbers["mass, random, rounds 2"]
assert numbers["mass, window"] > numbers["mass, lsh, rounds 1"]

# %% [markdown]
# One more caution. A causal mask hides later tokens, but later tokens are sorted, too, and shift the chunks: which of
# the earlier keys a query meets depends on what comes after it. Their values never get through; their hashes do.

# %%
later = buckets[..., :120]
short, _ = lsh.lsh_attention(k[:, :, :120], v[:, :, :120], later, 8)
long, _ = lsh.lsh_attention(k, v, buckets, 8)
changed = np.abs(short - long[:, :, :120]).max(axis=-1) > 1e-9
print(f"eight more tokens change {changed.mean():.0%} of the rows before them")
assert changed.any()

# %% [markdown]
# ## What it costs
#
# Operations of one head. Attention inside chunks grows with the length; hashing into as many buckets as chunks still
# grows with its square, only 1 / chunk as steeply. The paper cuts long hashes in two for that reason.

# %%
lengths = [2**n for n in range(8, 18)]
counted = [lsh.lsh_operations(n, 128, 64, 4, n // 64) for n in lengths]
drawn, axes = figure(width=4.6, height=2.6)
axes.plot(lengths, [lsh.exact_operations(n, 128) for n in lengths], **series("baseline"), label="exact")
axes.plot(lengths, counted, **series("method"), label="LSH, 4 rounds of 64")
axes.plot(lengths, [lsh.lsh_operations(n, 128, 64, 4, 0) for n in lengths], **series("muted"), label="without hashing")
axes.loglog()
axes.set(xlabel="tokens", ylabel="operations")
legend(axes)
drawn

# %% [markdown]
# For short texts LSH does more work than exact attention does; for long ones a small part of it.

# %%
assert counted[0] > lsh.exact_operations(lengths[0], 128) and counted[-1] < lsh.exact_operations(lengths[-1], 128) / 8

# %% [markdown]
# ## The kernel
#
# A program takes a chunk of the sorted order and gathers its queries, keys and values from where they lie; no sorted
# copy is made. It leaves each round's result at its token's place, and a second kernel merges. The floor is the bytes
# of inputs and outputs; every round reads the inputs again.

# %%
gpu = hardware.GPUS["H200"]
for case in cases.cases("attention.lsh"):
    floor = 1e6 * hardware.floor_seconds(case, gpu)
    print(f"{case.name:52} {case.bytes / 1e6:4.0f} MB, {case.operations / 1e9:4.0f} GFLOP, floor {floor:4.0f} µs")
flash = next(other for other in cases.cases("attention.flash") if other.name == "4096 tokens, 32 heads of 128")
assert cases.cases("attention.lsh")[0].operations < flash.operations

# %% [markdown]
# What the compiler makes of the kernels for an H100 or H200 (sm_90):

# %%
report = check.static_report("attention.lsh", [90])
for row in report:
    print(f"{row['case']:52} {row['kernel']:13} {row['registers']:3} registers, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the same in torch:

# %%
for row in bench.recorded("attention.lsh"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.lsh"):
    print("not recorded yet: python -m kernels bench attention.lsh, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# ```
# python -m chapters exercise lsh --to my
# python -m pytest --submission my tests/attention/test_lsh.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["lsh"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["lsh"])) == 5
