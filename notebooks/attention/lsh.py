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
from chapters.figures import COLOURS, MARKERS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared.hashed_attention import LshAttend, exact_attend
from kernels import bench, cases, check, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
D = lab.config.head_dim

# %% [markdown]
# ## What hurts
#
# Reformer uses one projection for queries and keys: a token's query is its key. Here are the real model's keys of two
# texts, used so: the score of two tokens is the product of their keys, one of them divided by its length. Sort each
# query's weights by size: how much of the softmax do its largest few hold?

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
# In the last layer, and for queries that see 64 keys or more, 96 on average. Whoever knew the best sixteen of them
# would have more than half of what attention does, for a sixth of the work:

# %%
largest = -np.sort(-weights, axis=-1)
drawn, axes = figure(height=2.6)
axes.plot(range(1, 65), largest.cumsum(-1).mean((0, 1, 2))[:64], **series("method") | {"marker": ""}, label="largest")
axes.plot([1, 64], [1 / 96, 64 / 96], **series("muted"), label="drawn at random")
axes.set(xlabel="keys", ylabel="share of the softmax", ylim=(0, 1), title="a few keys hold most of the weight")
legend(axes)
assert largest[..., :16].sum(-1).mean() > 0.5
drawn

# %% [markdown]
# ## A hash that keeps neighbours together
#
# Rotate a vector at random and note which axis it then lies closest to, and on which side: that is its bucket. No
# distance is computed. Here are all directions in the plane, three times, each time with rotations of its own and the
# four buckets that they make, a marker and a shade for each. Follow the two lines, 25 degrees apart: do they share a
# bucket each time?

# %%
turns = np.linspace(0, 2 * np.pi, 72, endpoint=False)
circle = np.stack([np.cos(turns), np.sin(turns)], axis=-1)
drawn, axes = panels(3, width=6.6, height=2.3, sharey=True)
for place, found in zip(axes, lsh.hash_buckets(circle, np.random.default_rng(4).normal(size=(2, 3, 2))), strict=True):
    for bucket, role in enumerate(("method", "baseline", "second", "muted")):
        place.plot(*circle[found == bucket].T, MARKERS[role], color=COLOURS[role], markersize=5)
    for degrees in (10, 35):
        place.plot([0, np.cos(np.radians(degrees))], [0, np.sin(np.radians(degrees))], color=COLOURS["reference"])
    place.set(xticks=[], yticks=[], aspect="equal")
drawn

# %% [markdown]
# Now and then an edge falls between them: that is why several rounds are better than one. How often do two vectors
# share one of 16 buckets, in as many dimensions as the model's keys have? Over 2,000 rounds:

# %%
rotations = np.random.default_rng(0).normal(size=(D, 2000, 8))
angles = np.linspace(0, np.pi, 13)
pairs = np.zeros((13, 2, D))
pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 1, 1] = 1, np.cos(angles), np.sin(angles)
shared = [np.mean(np.equal(*lsh.hash_buckets(pair, rotations).T)) for pair in pairs]
drawn, axes = figure(height=2.4)
axes.plot(np.degrees(angles), shared, **series("method"))
axes.set(xlabel="angle, degrees", ylabel="share of rounds", title="near vectors often meet, opposite ones never")
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
# What does sorting do to the scores? On the left how alike the keys of one head are, in the order of the text; on the
# right the same numbers after the rows and the columns were sorted by bucket. What is alike has moved to the diagonal,
# and only along the diagonal scores are computed. (`at_home` says how alike tokens are that stand less than a chunk
# apart.)

# %%
unit = keys[0][0, 2] / np.linalg.norm(keys[0][0, 2], axis=-1, keepdims=True)
alike, order = np.maximum(unit @ unit.T, 0), np.argsort(buckets[0, 2, 0], kind="stable")
drawn, axes = panels(2, width=7.2, height=2.8)
at_home = []
for place, matrix, name in zip(axes, (alike, alike[np.ix_(order, order)]), ("the text", "buckets"), strict=True):
    heatmap(place, matrix, "cosine, 0 if negative", limit=1)
    place.set(xlabel="key", ylabel="query", title=f"in the order of {name}", xticks=range(0, 128, 32))
    at_home.append(matrix[np.abs(np.subtract.outer(np.arange(128), np.arange(128))) < chunk].mean())
assert at_home[1] > 1.1 * at_home[0]
drawn

# %% [markdown]
# This is a head of the first layer. In later layers neighbours in the text are alike already, partly because keys are
# turned by their position. For those the text is well sorted as it is: a rival that we shall meet again.

# %%
unit = keys[-1] / np.linalg.norm(keys[-1], axis=-1, keepdims=True)
alike = np.maximum(unit @ unit.swapaxes(-1, -2), 0)
neighbours = np.abs(np.subtract.outer(np.arange(128), np.arange(128))) < chunk
assert alike[..., neighbours].mean() > 1.2 * alike.mean()

# %% [markdown]
# Which pairs meet? Each row of the picture is a query, each column a key, and colour counts the rounds in which they
# met. More rounds fill it in, first where vectors are close. Live, change the rounds; "none" hashes nothing: all tokens
# fall into one bucket, the sorted order is that of the text, and a chunk is a window.


# %%
def drawn_meetings(rounds=4, hashes="lsh"):
    """How often each of 64 queries meets each key before it, in one head of the first layer."""
    found = LshAttend(rounds, 8, hashes).buckets(torch.from_numpy(keys[0])).numpy()
    drawn, axes = figure(width=4.4, height=3.0)
    heatmap(axes, lsh.times_seen(found, 8)[0, 0, :64, :64], "rounds")
    axes.set(xlabel="key", ylabel="query", title=f"who met, in {rounds} round{'s' * (rounds > 1)}")
    return drawn


explore(drawn_meetings, rounds=[1, 2, 4, 8], hashes=["lsh", "none"])

# %% [markdown]
# ## Merge
#
# Every round leaves an output and the log of its sum of exponentials, its lse, and that is all a merge needs, as
# between the runs of Flash-Decoding: a round weighs exp(lse of the round − lse of all). A pair that met several times
# would count several times; with repeats taken out (`dedup`), the result is exactly attention to the union of what was
# seen:

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
# The claim trains the base model on for some steps with its keys as queries, which costs perplexity by itself, and then
# puts LSH in place of exact attention. Two controls: random buckets, to see what the hash is worth, and windows of the
# same chunks, to see what sorting is worth. On the left the share of the softmax that is found, on the right what the
# model pays for the rest. From how many rounds on will LSH beat the window?

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
# Operations of one head of 128 channels. Attention inside chunks grows with the length; hashing into as many buckets as
# there are chunks still grows with its square, only 1 / chunk as steeply. The paper cuts long hashes in two for that
# reason.

# %%
lengths = [2**n for n in range(8, 18)]
counted = [lsh.lsh_operations(n, 128, 64, 4, n // 64) for n in lengths]
drawn, axes = figure(height=2.8)
axes.plot(lengths, [lsh.exact_operations(n, 128) for n in lengths], **series("baseline"), label="exact")
axes.plot(lengths, counted, **series("method"), label="LSH, 4 rounds of 64")
axes.plot(lengths, [lsh.lsh_operations(n, 128, 64, 4, 0) for n in lengths], **series("muted"), label="hashes for free")
axes.loglog()
axes.set(xlabel="tokens", ylabel="operations", title="LSH is for long texts")
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
# copy is made. It leaves each round's result at its token's place, and a second kernel merges. Inputs and outputs pass
# through memory at least once, and pairs inside of chunks must be multiplied; the floor is the longer of the two. With
# few rounds that is nearly the bytes, with many the products.

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
# The tests say what is left to you: the buckets, who meets whom, attention round by round, and both kernels.
#
# ```
# python -m chapters exercise lsh --to my
# python -m pytest --submission my tests/attention/test_lsh.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["lsh"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["lsh"])) == 5
