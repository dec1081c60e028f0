# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Adaptive span: how far back does a head have to look?
#
# Every head of a transformer compares every token with all tokens before it, and every layer keeps the keys and values
# of them all. Some heads need that. Others look at the last few tokens and give the rest almost no weight. This
# notebook lets each head learn how far back it looks, and then stops reading, and keeping, what lies beyond.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import adaptive_span
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.shared.decode_measures import record_attention
from chapters.shared.span_layers import AdaptiveSpan
from kernels import bench, cases, check, hardware
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Queries and keys of the base model as it reads four texts of 128 tokens. With spans as long as the text, the chapter's
# attention is the plain one; with a span of 0 and a ramp of 16 it reads 16 keys. How much does that change what a head
# says, relative to what it says?

# %%
full, near = (np.full(lab.config.heads, span) for span in (128.0, 0.0))
change = []
for q, k, v in record_attention(lab, lab.validation[:4]):
    everything, _ = adaptive_span.span_attention(q, k, v, full, 16)
    nearby, _ = adaptive_span.span_attention(q, k, v, near, 16)
    squares = np.square(everything - nearby).sum(axis=(0, 2, 3)) / np.square(everything).sum(axis=(0, 2, 3))
    change.append(np.sqrt(squares))

# %% [markdown]
# Dark heads hardly notice that all but 16 keys are gone; bright ones do. In plain attention they read and keep equally
# many.

# %%
added = np.array(change)
drawn, axes = figure(width=4.6, height=2.8)
heatmap(axes, added, "relative change", digits=2)
axes.set(xlabel="head", ylabel="layer", title="some heads need far keys, some do not")
assert added.max() > 2 * added.min()
drawn

# %% [markdown]
# ## A length with a gradient
#
# A window that is cut off hard has a length, but no gradient: move the end by a little and nothing changes, until a key
# drops out. So let z, the span, be any number, and let the mask m(x) of a key at distance x fall from 1 to 0 along a
# ramp of R keys, from x = z to x = z + R. A longer span moves the ramp, and every key on it counts a little more.

# %%
distance = np.arange(0, 64)
drawn, axes = figure(height=2.4)
for span, role in ((0.0, "muted"), (8.0, "method"), (20.5, "second")):
    mask = adaptive_span.soft_mask(distance, np.array(span), 32, 512)
    axes.plot(distance, mask, **series(role), markevery=4, label=f"z = {span:g}")
    assert (mask > 0).sum() == adaptive_span.keys_read(np.array(span), 32, 512)
axes.set(xlabel="distance x from the query, tokens", ylabel="mask m(x)", title="a span with a ramp of R = 32")
legend(axes)
drawn

# %% [markdown]
# The mask multiplies the exponentials, before they are divided by their sum, so the weights still sum to 1. What is
# masked out is gone: cut off the keys that no head reaches, and the output stays the same.

# %%
spans = np.array([0.0, 8.0, 20.5, 3.0])
whole = adaptive_span.span_attention(q[:, :, -1:], k, v, spans, 32)
rows = adaptive_span.keys_read(spans, 32, 128).max()
cut = adaptive_span.span_attention(q[:, :, -1:], k[:, :, -rows:], v[:, :, -rows:], spans, 32, 128)
for one, other in zip(whole, cut, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
print(f"{rows} of {k.shape[2]} keys are read")

# %% [markdown]
# And the spans have a gradient. Make each a little longer, and the loss, here a random mix of the outputs, changes by
# as much as `span_attention_backward` says:

# %%
q, k, v = (x[:1].astype(float) for x in (q, k, v))
dout = np.random.default_rng(0).normal(size=q.shape)
forward = adaptive_span.span_attention(q, k, v, spans + 0.25, 32)
gradient = adaptive_span.span_attention_backward(dout, q, k, v, *forward, spans + 0.25, 32)[3]
longer = adaptive_span.span_attention(q, k, v, spans + 0.25 + 1e-6, 32)
change = ((longer[0] - forward[0]) * dout).sum(axis=(0, 2, 3)) / 1e-6
np.testing.assert_allclose(gradient, change, atol=1e-4)

# %% [markdown]
# ## Let the model choose
#
# The loss gets a penalty, λ for each token of a layer's mean span. A head that gains nothing from far keys gives them
# up; one that needs them keeps them, and pays. This is the chapter's claim, in its quick version: all weights are
# trained on with a span for each head, from the whole text downwards, and beside it the same training without. Look
# back at the heads that changed most, above: will it be they that keep a long span?

# %%
claim = adaptive_span.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# In the paper, lower layers end with the shorter spans. In a model of four layers that shows in its halves at most, not
# from one layer to the next: heads of one layer differ as much as layers do. About half of the keys are not
# read any more, and the model is nearly as good as after the same training without spans. So few steps, with one λ,
# show no more than that; what a larger λ or a longer text would leave is not shown.

# %%
found = np.array([[claim.numbers[f"span, layer {i}, head {h}"] for h in range(lab.config.heads)]
                  for i in range(lab.config.layers)])  # fmt: skip
assert found.min() >= 0 and found.max() <= 256
assert claim.numbers["share of keys read"] < 0.7
assert claim.numbers["perplexity, with spans"] < 1.1 * claim.numbers["perplexity, trained without spans"]

# %% [markdown]
# Did the training find what the measurement at the beginning saw? A dot for each head:

# %%
drawn, axes = figure(width=5.6, height=2.8)
for layer, role in zip(range(len(found)), ("method", "baseline", "accent", "second", "third"), strict=False):
    axes.plot(added[layer], found[layer], **series(role) | {"linestyle": ""}, label=f"layer {layer}")
axes.set(xlabel="change of the output without far keys", ylabel="learnt span, tokens")
axes.set_title("who needs far keys keeps them")
legend(axes)
assert np.corrcoef(added.ravel(), found.ravel())[0, 1] > 0.4
drawn

# %% [markdown]
# Nearly: the heads that far keys changed most have kept long spans, and most of the others have given up everything but
# the ramp. A head may also have changed its ways, for the weights were trained on with the spans.
#
# ## A shorter cache
#
# When the spans are known, a key head keeps as many positions as its query heads read, and forgets older ones. That
# is no approximation. Below, the model gets the spans that were just learnt, and reads a text token by token: once with
# all its keys, once with those only. It saves more the longer the text is: a trimmed cache stops growing. How much will
# the logits differ?

# %%
model = lab.model()
layers = [AdaptiveSpan(lab.config.heads, 256, 32) for _ in found]
for i, layer in enumerate(layers):
    layer.held.data = torch.tensor(found[i], dtype=torch.float32) / 256
    surgery.set_attend(model, i, layer)
difference, share = adaptive_span.trimming(model, layers, lab.calibration(0, 1, 256)[0])
print(f"{share:.0%} of the bytes; largest difference of a logit {difference:.0e}")
assert difference < 1e-4 and share < 0.7

# %% [markdown]
# ## The kernel: tiles that are not loaded
#
# FlashAttention walks over the keys in tiles. With a span it begins at the oldest key within span + ramp, and only
# where the ramp or the diagonal passes through a tile the mask is computed at all. Below, tiles of 16 × 16 for a text
# of 128 tokens: the number is the mean of the mask in the tile. Tiles with a dash are skipped; the others are read, and
# those with 1.0 need no mask. Turn the knob where the notebook is live.


# %%
def visited(span=16):
    x = adaptive_span.distances(128, 128)
    mask = adaptive_span.soft_mask(x, np.array(float(span)), 32, 128).reshape(8, 16, 8, 16).mean(axis=(1, 3))
    drawn, axes = figure(width=4.8, height=3.0)
    heatmap(axes, np.where(mask > 0, mask, np.nan), "mean of the mask", limit=1.0, digits=1)
    title = f"span {span}: {(mask > 0).sum()} of {8 * 9 // 2} tiles are read"
    axes.set(xlabel="tile of keys", ylabel="tile of queries", title=title)
    return drawn


explore(visited, span=(0, 128, 8))

# %% [markdown]
# What that leaves, for 32 heads of 128 channels whose spans spread as training leaves them, and 8,192 tokens? Every
# pair of a query and a key it reads takes 4 operations a channel: 2 for the score, 2 for the value. With so many
# queries for each key it is these that a GPU waits for, not the bytes. For all keys and for those within the spans:

# %%
case, gpu = cases.cases("attention.adaptive_span")[0], hardware.GPUS["H200"]
dense = 4 * 128 * 32 * 8192 * 8193 // 2
drawn, axes = figure(height=1.5)
axes.barh(["all keys", "within the spans"], [1e6 * n / gpu.bf16 for n in (dense, case.operations)],
          color=COLOURS["method"])  # fmt: skip
axes.set(xlabel="least time on an H200, µs", title=f"{case.operations / 1e9:.0f} of {dense / 1e9:.0f} GFLOP are left")
assert case.operations < 0.5 * dense and hardware.floor_seconds(case, gpu) == case.operations / gpu.bf16
drawn

# %% [markdown]
# Whether the kernel can come near that shows in its machine code, without a GPU (for an H100 or H200, sm_90):
# tensor-core instructions, loads of 128 bits, no spilled registers.

# %%
report = check.static_report("attention.adaptive_span", [90])
for row in report:
    print(f"{row['case']:40} {row['kernel']:21} {row['registers']:3} registers, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's operator with a mask for each head:

# %%
for row in bench.recorded("attention.adaptive_span"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.adaptive_span"):
    print("not recorded yet: python -m kernels bench attention.adaptive_span, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the mask, attention with it and its gradients, which tiles a kernel visits, and its
# inner loop.
#
# ```
# python -m chapters exercise adaptive_span --to my
# python -m pytest --submission my tests/attention/test_adaptive_span.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["adaptive_span"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["adaptive_span"])) == 5
