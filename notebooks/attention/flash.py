# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # FlashAttention: a softmax that never sees its whole row
#
# Attention compares every token with every other one. For a text of N tokens that makes N × N scores for each head,
# and a plain program writes them all to memory, reads them back for the softmax, writes the weights, and reads those
# again. FlashAttention computes the same numbers and never writes a score. This notebook shows how.
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import flash
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared.naive_attention import naive_attend, training_bytes
from kernels import bench, cases, check, hardware
from minitfm.model import causal_attention

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# We listen in on the model: its parameter `attend` lets us see the queries q, keys k and values v of every layer while
# it reads 128 tokens. `lse`, the log of the sum of a row's exponentials, turns a score x into a weight: exp(x − lse).

# %%
seen = []
listening = lab.model(attend=lambda q, k, v: seen.append((q, k, v)) or causal_attention(q, k, v))
with torch.no_grad():
    listening(lab.validation[:1])
q, k, v = (x.double().numpy() for x in seen[-1])
out, lse = flash.attention(q, k, v)
scores = flash.tile_scores(q, k, slice(None), slice(None), causal=True, scale=q.shape[3] ** -0.5)

# %% [markdown]
# Below the weights of one head of the last layer, all 128 × 128 of them: each row is a softmax of that query's scores,
# and the upper half is empty, because no token sees the ones after it.

# %%
drawn, axes = figure(width=4.0, height=3.0)
heatmap(axes, np.exp(scores - lse[..., None])[0, 0], "weight", limit=0.3)
axes.set(xlabel="key", ylabel="query", xticks=range(0, 128, 32), yticks=range(0, 128, 32))
drawn

# %% [markdown]
# Long streaks are a head that copies: it looks back to where the same words stood before. The picture has 16,384
# numbers per head, nearly all of them close to 0, and its area grows with the square of the text. To train, the weights
# have to be kept for the backward pass as well. Twice the text, four times the memory:

# %%
lengths = [128, 256, 512, 1024, 2048]
naive = [training_bytes(lab, naive_attend, n) / 1e6 for n in lengths]
drawn, axes = figure(height=2.6)
axes.bar([str(n) for n in lengths], naive, color=COLOURS["baseline"])
axes.set(xlabel="tokens", ylabel="MB for one layer", title="naive attention: twice the text, four times the memory")
assert 3.5 < naive[-1] / naive[-2] < 4.1
drawn

# %% [markdown]
# ## One row, a tile at a time
#
# Why keep a whole row? Because a softmax divides by the sum of all its exponentials, and because it subtracts the
# largest score first, lest they overflow. But a sum can be kept running, and so can a maximum. Whenever the maximum
# rises, what was summed so far is worth less by a known factor. `absorb_tile` is that step, and all of the idea.
#
# Here it walks along the last row of that head, in tiles of 16 keys.

# %%
row = slice(127, 128)
maximum, total, acc = np.full((1, 1), -np.inf), np.zeros((1, 1)), np.zeros((1, v.shape[3]))
history = []
for columns in flash.tiles(128, 16):
    maximum, total, acc = flash.absorb_tile(maximum, total, acc, scores[0, 0, row, columns], v[0, 0, columns])
    history.append((maximum.item(), total.item(), np.abs(acc / total - out[0, 0, row]).max()))
np.testing.assert_allclose(acc / total, out[0, 0, row], atol=1e-12)
np.testing.assert_allclose(maximum + np.log(total), lse[0, 0, row, None], atol=1e-12)

# %% [markdown]
# From left to right: the scores of the row (dots) and the running maximum (line); the running total, which falls where
# the maximum jumps, because the old exponentials shrink; and how far the running mean of the values is from the final
# output. At the last tile it arrives, exactly.

# %%
drawn, (left, middle, right) = panels(3, width=7.6, height=2.3)
ends = np.arange(16, 129, 16)
left.plot(scores[0, 0, 127], ".", color=COLOURS["muted"])
left.plot(ends, [step[0] for step in history], **series("method"))
middle.plot(ends, [step[1] for step in history], **series("method"))
right.plot(ends, [step[2] for step in history], **series("accent"))
for axes, title in ((left, "maximum"), (middle, "total"), (right, "error of the output")):
    axes.set(xlabel="keys seen", title=title)
drawn

# %% [markdown]
# A maximum only rises, and the total never falls below 1, the exponential of the largest score itself. So nothing can
# overflow, however large the scores. Without the maximum, a few scores near 1,000 are enough to break it:

# %%
assert np.all(np.diff([step[0] for step in history]) >= 0) and min(step[1] for step in history) >= 1
large = 300 * q
assert np.isfinite(flash.flash_attention(large, k, v)[0]).all()
with np.errstate(over="ignore"):
    assert np.isinf(np.exp(np.where(np.isinf(scores), 0, 300 * scores))).any()

# %% [markdown]
# ## All rows
#
# `flash_attention` does this for a tile of queries at once, and then for the next. What it holds is a tile of scores,
# never a row of tiles. Below, the order in which 8 × 8 tiles are visited: those past the diagonal are not visited at
# all, almost half of the work saved. The last tile of a text may be smaller; here 120 tokens make 7 and a half of them.

# %%
visits = np.full((8, 8), np.nan)
order = [(rows.start // 16, columns.start // 16) for rows in flash.tiles(120, 16)
         for columns in flash.key_tiles(rows, 120, 120, 16, causal=True)]  # fmt: skip
for step, place in enumerate(order):
    visits[place] = step + 1
drawn, axes = figure(width=3.8, height=2.8)
heatmap(axes, visits, "step", digits=0)
axes.set(xlabel="tile of keys", ylabel="tile of queries")
drawn

# %% [markdown]
# The tiles' sizes decide how much is held, not what comes out. Every choice gives the definition's result, also
# sizes that do not divide 128:

# %%
for block_q, block_k in ((1, 1), (16, 16), (7, 50), (128, 128)):
    tiled = flash.flash_attention(q, k, v, block_q=block_q, block_k=block_k)
    np.testing.assert_allclose(tiled[0], out, atol=1e-12)
    np.testing.assert_allclose(tiled[1], lse, atol=1e-12)

# %% [markdown]
# ## Backward, without having kept the weights
#
# Let S be the scores, P = exp(S − lse) the weights, O = PV the output, and dS, dP, dO the loss's gradient in each. The
# way back needs P again. FlashAttention keeps `lse`, one number for each row, and computes S once more, tile by tile.
# The softmax takes part of the gradient back from all scores of a row: dS = P ∘ (dP − δ), entry by entry. That δ would
# be a sum along the whole row of P ∘ dP, but it equals the row's dO · O, which is at hand. Below, the reference against
# torch's automatic gradient:

# %%
dout = np.random.default_rng(0).normal(size=q.shape)
gradients = flash.flash_attention_backward(dout, q, k, v, out, lse, block_q=32, block_k=32)
tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
expected = torch.autograd.grad(naive_attend(*tensors), tensors, torch.from_numpy(dout))
for found, truth in zip(gradients, expected, strict=True):
    np.testing.assert_allclose(found, truth, atol=1e-12)

# %% [markdown]
# ## In the model
#
# This is the chapter's claim, measured on the model: logits and gradients as exact as naive attention's, memory that
# grows like N. Exact is meant literally: FlashAttention is no approximation, both only round in another order. The axes
# of the figure are logarithmic. Which slopes do you expect?

# %%
claim = flash.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# A line of slope 1 and one of slope 2, as ranges:

# %%
assert claim.holds
assert claim.numbers["exponent of memory, flash"] < 1.1 < 1.8 < claim.numbers["exponent of memory, naive"]
assert claim.numbers["logit error, flash"] < 1e-5

# %% [markdown]
# ## Bytes are time
#
# Memory is not the only gain. A GPU computes much faster than it reads, so what counts is how often scores, keys and
# values pass between its memory and the chip. Naive attention moves the N × N matrix four times. FlashAttention moves
# no scores, but reads all keys and values once for each tile of queries: the more queries it keeps on chip, the less
# it reads. Below, GB for a layer of Llama-2-7B, 32 heads of 128 in bfloat16. Turn the knob where the notebook is live:
# with how few queries on chip would nothing be gained?


# %%
def traffic(block_q=128):
    lengths = [2**n for n in range(9, 15)]
    naive = [flash.hbm_bytes_naive((1, 32, n, 128), (1, 32, n, 128)) / 1e9 for n in lengths]
    tiled = [flash.hbm_bytes_flash((1, 32, n, 128), (1, 32, n, 128), block_q) / 1e9 for n in lengths]
    drawn, axes = figure(height=2.4)
    axes.loglog(lengths, naive, **series("baseline"), label="naive")
    axes.loglog(lengths, tiled, **series("method"), label=f"{block_q} queries on chip")
    axes.set(xlabel="tokens", ylabel="GB moved", title=f"{tiled[-1] / naive[-1]:.0%} of naive attention's bytes")
    legend(axes)
    return drawn


# %% [markdown]
# The lines are parallel: both grow with the square of the length, and only the distance between them can be chosen.

# %%
explore(traffic, block_q=[16, 32, 64, 128, 256])

# %% [markdown]
# With 256 queries on chip FlashAttention moves several times less, with 16 it would even move more. It is the memory on
# the chip that buys the savings, as the paper's theorem says, and that is why the kernel's tiles are as large as will
# fit. (On top of that, tiles that work side by side find each other's keys in the chip's cache.)

# %%
shape = (1, 32, 4096, 128)
moved = {block: flash.hbm_bytes_flash(shape, shape, block) for block in (16, 128, 256)}
assert 6 * moved[256] < flash.hbm_bytes_naive(shape, shape) < moved[16]
assert 7 < moved[16] / moved[128] < 8, "an eighth of the tile, nearly eight times the bytes"

# %% [markdown]
# ## The kernel
#
# The kernel holds the tiles in registers and shared memory, and takes exponentials to base 2, because GPUs have an
# instruction for 2ˣ. No kernel can be faster than its floor, the longer of two times: q, k, v and the output must pass
# through memory once, and the products must be computed. Here the second is longer, by far: attention, which used to
# wait for memory, has become a matter of arithmetic.

# %%
case = cases.cases("attention.flash")[0]
gpu = hardware.GPUS["H200"]
print(f"{case.name}: {case.bytes / 1e6:.0f} MB, at least {1e6 * case.bytes / gpu.bandwidth:.0f} µs; "
      f"{case.operations / 1e9:.0f} GFLOP, at least {1e6 * case.operations / gpu.bf16:.0f} µs")  # fmt: skip
assert hardware.floor_seconds(case, gpu) == case.operations / gpu.bf16

# %% [markdown]
# Whether the kernel can come near that shows in its machine code already, without a GPU (here for an H100 or H200,
# sm_90): tensor-core instructions (HGMMA), loads of 128 bits, no spilled registers.

# %%
report = check.static_report("attention.flash", [90])
for row in report:
    print(f"{row['case']:40} {row['kernel']:21} {row['registers']:3} registers, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's own FlashAttention and cuDNN:

# %%
for row in bench.recorded("attention.flash"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.flash"):
    print("not recorded yet: python -m kernels bench attention.flash, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the running softmax, both passes of the reference, and the inner loops of the
# kernels.
#
# ```
# python -m chapters exercise flash --to my
# python -m pytest --submission my tests/attention/test_flash.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["flash"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["flash"])) == 5
