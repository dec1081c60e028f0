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
from chapters.figures import figure, heatmap, legend, panels, series
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
# Bytes that one head of our model keeps while it writes: keys and values of every token, D = 32 numbers each, or what
# linear attention keeps instead, a D × D matrix and a vector, whatever the length. After how many tokens will the
# matrix be the smaller one?

# %%
lengths = [2**n for n in range(2, 12)]
drawn, axes = figure(height=2.8)
axes.plot(lengths, [linear.cache_bytes(n, D) for n in lengths], **series("baseline"), label="keys and values")
axes.plot(lengths, [linear.state_bytes(D, D)] * len(lengths), **series("method"), label="state")
axes.loglog()
axes.set(xlabel="tokens", ylabel="bytes per head", title="a cache grows, a state does not")
legend(axes)
assert linear.state_bytes(D, D) < linear.cache_bytes(D, D)
drawn

# %% [markdown]
# ## Move the brackets
#
# Softmax attention weighs the value v_s of a key k_s, for a query q, by exp(q·k_s). It needs q before it can do
# anything with v_s, so it keeps both. But let the weight be a product of features, φ(q)·φ(k_s), where φ is some
# function from vectors to vectors. Then q can be taken out of the sums:
#
#     Σ (φ(q)·φ(k_s)) v_s  /  Σ φ(q)·φ(k_s)   =   φ(q)ᵀ S / φ(q)·z      with  S = Σ φ(k_s) v_sᵀ,  z = Σ φ(k_s)
#
# S and z are the state. A new token adds to them, and nothing else of it is kept. Three forms of one formula: with all
# weights (parallel), token by token (recurrent), and in chunks, which is how a GPU wants it. Here φ(x) = elu(x) + 1,
# that is x + 1 above zero and exp(x) below.

# %%
q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 50, 8))
q, k = linear.elu_features(q), linear.elu_features(k)
parallel, _ = linear.linear_attention(q, k, v)
chunked, _ = linear.chunked_attention(q, k, v, chunk=16)
state, history = linear.empty_state(k, v), []
for t in range(50):
    out, state = linear.advance(state, q[:, :, t], k[:, :, t], v[:, :, t])
    history.append(state[0][0, 0])
    np.testing.assert_allclose(out, parallel[:, :, t], atol=1e-12)
np.testing.assert_allclose(chunked, parallel, atol=1e-12)

# %% [markdown]
# This is S after 1, 5 and 50 tokens. The first token is a matrix of rank 1, a column times a row. Later ones are added
# on top, and none can be taken out again: the longer the text, the more the state blurs.

# %%
drawn, places = panels(3, width=7.8, height=2.2)
for place, count in zip(places, (1, 5, 50), strict=True):
    heatmap(place, history[count - 1], "S")
    place.set(xlabel="value channel", title=f"after {count} token{'s' * (count > 1)}")
places[0].set_ylabel("feature")
assert np.linalg.matrix_rank(history[0]) == 1 and history[0].shape == history[-1].shape
drawn

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
# elu(x) + 1 is a similarity of its own, to be trained with. Performer wants to keep the softmax of a trained model:
# with m random directions w_i, its features exp(w_i·x − |x|²/2) / √m approximate exp(q·k), on average exactly. How far
# is one draw from the average? We listen in on the real model's queries and keys:

# %%
seen = []
with torch.no_grad():
    lab.model(attend=lambda *qkv: seen.append(qkv) or causal_attention(*qkv))(lab.validation[:1])


# %% [markdown]
# `weights` computes what each head gives to each of 32 tokens: by softmax, or by features of the Performer.


# %%
def weights(layer, features):
    """Weights of the keys, `[heads, queries, keys]`: softmax's for 0 features."""
    q, k = (x[0, :, :32].double().numpy() for x in seen[layer][:2])
    raw = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(D))
    if features:
        w = linear.orthogonal_projection(features, D)
        raw = linear.favor_features(q, w, True, 0.0) @ linear.favor_features(k, w, False, 0.0).swapaxes(1, 2)
    raw = np.tril(raw)
    return raw / raw.sum(-1, keepdims=True)


# %% [markdown]
# One head, by softmax and by the Performer. Bright cells are keys that matter most to a query; does the right picture
# have them in the same places? Live, choose the layer and the number of features. In which layer do few suffice?


# %%
def side_by_side(layer=1, features=256):
    drawn, places = panels(2, width=7.4, height=2.9)
    titles = {0: f"softmax, layer {layer}", features: f"{features} random features"}
    for place, (m, title) in zip(places, titles.items(), strict=True):
        heatmap(place, weights(layer, m)[0], "weight", limit=0.5)
        place.set(xlabel="key", ylabel="query", title=title)
    return drawn


explore(side_by_side, layer=list(range(lab.config.layers)), features=[16, 256, 4096])

# %% [markdown]
# They do not. The brightest column on the left, a key that matters to many queries, is missing on the right, and others
# have taken its place. Half of the summed difference is the share of the weight that went to wrong keys, 0 at best and
# 1 at worst. An average over m draws should be wrong as 1 / √m, the dashed slope: four times the features, half the
# error.

# %%
counts = [16, 64, 256, 1024, 4096]
drawn, axes = figure(height=3.0)
for layer, role in zip(range(lab.config.layers), ("method", "baseline", "accent", "second", "third"), strict=False):
    wrong = [np.abs(weights(layer, m) - weights(layer, 0)).sum(-1).mean() / 2 for m in counts]
    axes.loglog(counts, wrong, **series(role), label=f"layer {layer}")
    assert wrong[-1] < wrong[0]
axes.loglog(counts, 0.2 / np.sqrt(counts), **series("reference"), label="∝ 1 / √m")
axes.set(xlabel="random features m", ylabel="weight on wrong keys", title="sharp attention needs very many features")
legend(axes, bbox_to_anchor=(1, 0.5), loc="center left")
drawn

# %% [markdown]
# So it is in the first layer, whose scores are all close to 0. In the others attention is sharp, and exp(w·x) is then
# something that is nearly always tiny and now and then huge: the average hangs on draws that hardly ever come, and a
# few thousand features still miss them. What does that say about the perplexity of a model with 16 and with 256 of
# them?
#
# ## When does it pay, and what does it cost?
#
# The claim: time of one layer against its length, and the perplexity of the base model with each attention put in
# place of softmax. On the left, look where a line crosses that of softmax: from there on it pays. On the right,
# Performer's line hardly falls, and stands high above softmax: features that a model was not trained with are no free
# replacement. A few steps of training win much of it back, here for elu.

# %%
claim = linear.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Training helps the plain feature map; softmax stays ahead. What the claim does not show: a model trained with linear
# attention from the start, which comes much closer. And the times are this CPU's.

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
# Per token only a fixed number of bytes moves, so there is no square of the length anywhere: q, k, v and the output of
# 4,096 tokens, 32 heads of 128 channels, 2 bytes each. FlashAttention moves as much, but computes ten times as many
# products. Its floor is arithmetic; here it is memory.

# %%
case = cases.cases("attention.linear")[0]
gpu = hardware.GPUS["H200"]
print(f"{case.name}: {case.bytes / 1e6:.0f} MB, {case.operations / 1e9:.1f} GFLOP; floor "
      f"{1e6 * hardware.floor_seconds(case, gpu):.0f} µs on an H200")  # fmt: skip
flash = next(other for other in cases.cases("attention.flash") if other.name == case.name)
assert case.operations < flash.operations / 10
assert hardware.floor_seconds(case, gpu) == case.bytes / gpu.bandwidth

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
# The tests say what is left to you: Performer's features, one step of the state, the chunked form, and the inner loops
# of two kernels.
#
# ```
# python -m chapters exercise linear --to my
# python -m pytest --submission my tests/attention/test_linear.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["linear"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["linear"])) == 5
