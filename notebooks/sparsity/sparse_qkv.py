# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Sparse QKV: a projection with a fiftieth of the weights
#
# To write one token, a model reads all its weights. A quarter of those in a block of Llama-7B make the queries, keys
# and values of attention. Pruning takes some weights away and must say which. The paper *Scaling Transformer* builds
# these three projections of two layers that have hardly any weights to begin with. This notebook shows what such a
# layer can still do, trains one beside a dense one, and counts what it reads.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared.conv_cache import start
from chapters.sparsity import sparse_qkv as sparse
from kernels import bench, cases, check
from kernels.sparsity import sparse_qkv as kernel

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# A dense projection of d inputs to d outputs has d² weights, and there are three of them. Here is how that grows with
# the width of a model whose heads have 128 channels, and how the weights of the two layers do:

# %%
widths = [512, 1024, 2048, 4096, 8192]
drawn, axes = figure(height=2.6)
axes.loglog(widths, [3 * d * d for d in widths], **series("baseline"), label="dense")
axes.loglog(widths, [sparse.qkv_weights(d, d // 128, 128) for d in widths], **series("method"), label="sparse")
ratio = 3 * 4096**2 / sparse.qkv_weights(4096, 32, 128)
axes.set(xlabel="width d", ylabel="q, k, v weights of a layer", title=f"at d = 4096: {ratio:.0f} times fewer weights")
legend(axes)
assert 45 < ratio < 55
drawn

# %% [markdown]
# ## The multiplicative layer
#
# The d outputs stand in S modules of M channels each. A weight of a dense layer belongs to an input i, a module s and a
# channel m, and there are d · S · M of them. Here it is a product of two numbers, D[s, i] · E[i, m]. D (`gates`) holds
# d numbers for each module, by which it gates the inputs; then all modules multiply by the same small matrix E
# (`shared`).

# %%
rng = np.random.default_rng(0)
x, gates, shared = rng.normal(size=(3, 16)), rng.normal(size=(4, 16)), rng.normal(size=(16, 4))
z = sparse.multiplicative(x, gates, shared)
for s in range(4):
    np.testing.assert_allclose(z[:, s], (x * gates[s]) @ shared, atol=1e-12)
z.shape

# %% [markdown]
# So the weights that belong to one input, a matrix of modules by channels, have rank 1. Is anything left that such a
# layer can do? The paper's theorem: any permutation of the inputs. An input passes the gate of the one module that it
# is to go to, and the shared matrix puts it in its channel. Look down a column: one bright cell on the left and one on
# the right say where that input goes, and no two inputs go to the same place.

# %%
order = rng.permutation(16)
gates, shared = sparse.permutation_weights(order, 4)
assert np.array_equal(sparse.multiplicative(x, gates, shared).reshape(3, 16), x[:, order])
drawn, (left, right) = panels(2, width=7.2, height=2.4)
heatmap(left, gates, "gate D")
heatmap(right, shared.T, "E, transposed")
left.set(xlabel="input", ylabel="module", title="which module")
right.set(xlabel="input", ylabel="channel", title="which channel")
drawn

# %% [markdown]
# ## The convolution
#
# The modules of the last tokens are a picture: one axis is time, the other the modules. Three kernels make q, k and v
# of it, each a small M × M matrix for each of 3 × 3 (v: 3 × 1) neighbours. Time is padded on the left only. So who
# hears what one module says at one time? The modules beside it, at this and the next two times, and no earlier one.
# Move it:


# %%
def heard_by(token=3, module=2):
    z = np.zeros((1, 8, 6, 1))
    z[0, token, module] = 1
    heard = sparse.causal_convolution(z, np.ones((3, 3, 1, 1)))
    assert not heard[:, :token].any() and heard[:, token:].any() and not heard[:, token + 3 :].any()
    drawn, axes = figure(width=5, height=2.2)
    heatmap(axes, heard[0, :, :, 0].T + 2 * z[0, :, :, 0].T, "3: says, 1: hears")
    axes.set(xlabel="time", ylabel="module")
    return drawn


explore(heard_by, token=(0, 7), module=(0, 5))

# %% [markdown]
# ## Decoding needs a state
#
# The next step has to know the last two rows of z. They cannot be had from keys and values. So `sparse_qkv` returns
# them, and the next call takes them. Wherever a text is cut, the results are those of the whole:

# %%
x, gates, shared = rng.normal(size=(1, 9, 16)), rng.normal(size=(4, 16)), rng.normal(size=(16, 4))
kernels = [rng.normal(size=(3, width, 4, 4)) for width in sparse.WIDTHS.values()]
whole = sparse.sparse_qkv(x, gates, shared, *kernels)
q, state = [], None
for part in np.split(x, [1, 4, 5], axis=1):
    *made, state = sparse.sparse_qkv(part, gates, shared, *kernels, state)
    q.append(made[0])
np.testing.assert_allclose(np.concatenate(q, axis=1), whole[0], atol=1e-12)
np.testing.assert_allclose(state, whole[3], atol=1e-12)

# %% [markdown]
# In the model the state lives in the cache, the one object that belongs to a text: a `ConvCache` wraps any cache, and
# has a place for each layer. Give the model a plain cache and it refuses, because the next token would be wrong without
# any sign of it. The model here is small and still untrained:

# %%
config = sparse.sized(lab.config)
model, tokens = sparse.variant(sparse.SPARSE, config, config.heads, 0).eval(), lab.validation[:2]
assert sparse.decoding_error(model, tokens) < 1e-3
cache = start(model, batch=2)
with torch.no_grad():
    model(tokens, cache)
keys = cache.cache.nbytes()
states = sum(state.nbytes for state in cache.states)
print(f"{keys:,} bytes of keys and values, {states:,} of states, which do not grow")
assert states * 32 < keys

# %% [markdown]
# ## Does it learn?
#
# Dense weights have no sparse form that is close to them, so models are trained from scratch, with the same text in the
# same order: dense, sparse, sparse without a look at earlier tokens (1 tap), and a dense one whose projections have a
# low rank and as many weights as the sparse ones. In which order will they come?

# %%
claim = sparse.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# These few steps show who learns fast. The low rank, with the same number of weights, comes last; the sparse
# projections are not behind the dense ones. That they can look at two earlier tokens explains a part of it only: with
# one tap they cannot. Small models trained for a minute do not tell how large ones end.

# %%
found = claim.numbers
assert found["q, k, v weights of a layer, sparse"] < 0.2 * found["q, k, v weights of a layer, dense"]
assert found["perplexity, sparse"] < found["perplexity, low rank"]
assert found["perplexity, sparse"] < 1.1 * found["perplexity, dense"]

# %% [markdown]
# The recorded claim trains for longer, from three seeds. In its own words:

# %%
record = claims.recorded("sparse_qkv")
print(record["sentence"] if record else "not recorded yet: python -m chapters claim sparse_qkv --full")
assert record is None or record["numbers"]["perplexity, dense"] > 1

# %% [markdown]
# ## The kernel, in bytes
#
# Both layers run in one launch, and z stays on the chip. Torch, one operator after the other, stores z, reads it for
# each of the three convolutions, and gates the inputs once for every module. For 8,192 tokens of a Llama-7B layer:

# %%
tokens, d, modules, channels = 8192, 4096, 32, 128
fused = kernel.floor_bytes(4, tokens // 4, d, modules, channels)
apart = fused + 2 * tokens * (2 * modules * d + 4 * modules * channels)
drawn, axes = figure(height=1.8)
axes.barh(["one operator after the other", "fused"], [apart / 1e9, fused / 1e9], color=COLOURS["method"])
axes.set(xlabel="GB through memory", title="what stays on the chip need not be moved")
assert apart > 10 * fused
drawn

# %% [markdown]
# A decoding step is bound by what it reads. A dense layer reads three matrices of 4,096 × 4,096:

# %%
for case in cases.cases("sparsity.sparse_qkv"):
    if "decode" in case.name:
        print(f"{case.name:40} {case.bytes / 1e6:5.1f} MB, the weights of a dense layer {6 * d * d / 1e6:6.1f} MB")
        assert case.bytes < 6 * d * d / 10

# %% [markdown]
# What the compiler makes of it, seen without a GPU (here for an H100 or H200, sm_90):

# %%
report = check.static_report("sparsity.sparse_qkv", [90])
for row in report[1:3]:
    print(f"{row['kernel']:16} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the same layers by torch:

# %%
for row in bench.recorded("sparsity.sparse_qkv"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("sparsity.sparse_qkv"):
    print("not recorded yet: python -m kernels bench sparsity.sparse_qkv, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the two layers, the permutation, their state, and the kernel of a decoding step.
#
# ```
# python -m chapters exercise sparse_qkv --to my
# python -m pytest --submission my tests/sparsity/test_sparse_qkv.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["sparse_qkv"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["sparse_qkv"])) == 5
