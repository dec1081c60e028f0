# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Linear attention: a past that fits into one matrix
#
# To write one more token, softmax attention reads the keys and values of all tokens before it. The cache that holds
# them grows with the text, and so does the time. Linear attention keeps a matrix of fixed size instead. This notebook
# shows when that pays, and what it costs a model that was trained with softmax.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import linear
from chapters.explore import explore
from chapters.figures import figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.shared.feature_attention import StateCache
from kernels import bench, cases, check, hardware
from minitfm.model import causal_attention

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
D = lab.config.head_dim

# %% [markdown]
# ## What hurts
#
# Bytes that one head keeps while it writes: keys and values of every token, or the state (S, z).

# %%
lengths = [2**n for n in range(2, 12)]
drawn, axes = figure(height=2.8)
axes.plot(lengths, [linear.cache_bytes(n, D) for n in lengths], **series("baseline"), label="keys and values")
axes.plot(lengths, [linear.state_bytes(D, D)] * len(lengths), **series("method"), label="state")
axes.loglog()
axes.set(xlabel="tokens", ylabel="bytes per head")
legend(axes)
assert linear.state_bytes(D, D) < linear.cache_bytes(D, D)
drawn

# %% [markdown]
# ## Move the brackets
#
# Softmax needs q·k before it can do anything with v. If the weight of a key is a product of features, φ(q)·φ(k), then
# the sum over keys of φ(k) vᵀ can be taken first. Three forms of one formula: with all weights (parallel), token by
# token (recurrent), and in chunks.

# %%
generator = np.random.default_rng(0)
q, k, v = generator.normal(size=(3, 1, 1, 50, 8))
q, k = linear.elu_features(q), linear.elu_features(k)
parallel, _ = linear.linear_attention(q, k, v)
chunked, _ = linear.chunked_attention(q, k, v, chunk=16)
state = linear.empty_state(k, v)
for t in range(50):
    out, state = linear.advance(state, q[:, :, t], k[:, :, t], v[:, :, t])
    np.testing.assert_allclose(out, parallel[:, :, t], atol=1e-12)
np.testing.assert_allclose(chunked, parallel, atol=1e-12)

# %% [markdown]
# In the model a cache of such states decodes without keys or values. Its size after 20 tokens is that after 100:

# %%
cache = StateCache(linear.make_attend())
model = lab.model(attend=cache.attend)
with torch.no_grad():
    model(lab.validation[:1, :20], cache)
    size = cache.nbytes()
    model(lab.validation[:1, 20:100], cache)
assert cache.nbytes() == size == lab.config.layers * lab.config.heads * linear.state_bytes(D, D)

# %% [markdown]
# ## Which features?
#
# elu(x) + 1 is a similarity of its own, to be trained with. Performer's random features approximate exp(q·k), on
# average exactly. How far one draw is from it depends on how sharp the attention is. Here are weights of the real
# model: softmax's, then Performer's with more and more features.

# %%
seen = []
with torch.no_grad():
    lab.model(attend=lambda *qkv: seen.append(qkv) or causal_attention(*qkv))(lab.validation[:1])


# %% [markdown]
# `weights` computes what a head gives to each key: by softmax, or by features of the Performer.


# %%
def weights(layer=1, features=64):
    """Weights of the keys of 32 tokens in one head: softmax's for 0 features."""
    q, k = (x[0, :1, :32].double().numpy() for x in seen[layer][:2])
    raw = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(D))
    if features:
        w = linear.orthogonal_projection(features, D)
        raw = linear.favor_features(q, w, True, 0.0) @ linear.favor_features(k, w, False, 0.0).swapaxes(1, 2)
    raw = np.tril(raw)
    return raw / raw.sum(-1, keepdims=True)


# %% [markdown]
# And a picture of such weights beside those of softmax, which sum to one in each row as well.


# %%
def drawn_weights(layer=1, features=256):
    """The weights as a picture."""
    drawn, axes = figure(width=4.2, height=3.0)
    heatmap(axes, weights(layer, features)[0], "weight of the key for the query", limit=0.5)
    return drawn


explore(drawn_weights, layer=list(range(lab.config.layers)), features=[16, 256, 4096, 0])

# %% [markdown]
# The error in weight falls as features are added, but slowly, as 1 / √m:

# %%
counts = [16, 256, 4096]
errors = [np.abs(weights(0, m) - weights(0, 0)).sum(-1).mean() for m in counts]
assert errors[2] < errors[0]

# %% [markdown]
# ## When does it pay, and what does it cost?
#
# The claim: time of one layer against its length, and the perplexity of the base model with each attention put in
# place of softmax. Read both panels. A curve that falls on the right still stands high above softmax: features that
# the model was not trained with are no free replacement. A few steps of training win much of it back.

# %%
claim = linear.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Training helps the plain feature map; softmax stays ahead.

# %%
assert claim.numbers["perplexity ratio, elu, trained"] < claim.numbers["perplexity ratio, elu"]
assert claim.numbers["perplexity ratio, Performer, 16 features"] > 1

# %% [markdown]
# The counted crossover grows with the number of features: what Performer gains in accuracy it pays for in length.

# %%
assert linear.crossover(D, D) == 2 * (D + 1)
assert linear.crossover(256, D) > 7 * linear.crossover(D, D)

# %% [markdown]
# ## The kernel
#
# One pass walks along each head and leaves the state before every chunk; then all chunks are computed side by side.
# Per token only a fixed number of bytes moves, so there is no N² anywhere.

# %%
case = cases.cases("attention.linear")[0]
gpu = hardware.GPUS["H200"]
print(f"{case.name}: {case.bytes / 1e6:.0f} MB, {case.operations / 1e9:.1f} GFLOP; floor "
      f"{1e6 * hardware.floor_seconds(case, gpu):.0f} µs on an H200")  # fmt: skip
flash = next(other for other in cases.cases("attention.flash") if other.name == case.name)
assert case.operations < flash.operations / 4

# %% [markdown]
# What the compiler makes of the kernel for an H100 or H200 (sm_90):

# %%
report = check.static_report("attention.linear", [90])
for row in report:
    print(f"{row['case']:40} {row['kernel']:21} {row['registers']:3} registers, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the same in torch:

# %%
for row in bench.recorded("attention.linear"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.linear"):
    print("not recorded yet: python -m kernels bench attention.linear, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# ```
# python -m chapters exercise linear --to my
# python -m pytest --submission my tests/attention/test_linear.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["linear"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["linear"])) == 5
