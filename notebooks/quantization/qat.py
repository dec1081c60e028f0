# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Quantization-aware training: learn to be rounded
#
# Post-training methods take the weights as they are and round them well. At 2 bits a weight has four values left, and
# no choice among four is good enough for weights that never expected it. Here the model is trained a little further
# while it computes with rounded weights, so that it finds weights that round well.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, legend, series
from chapters.lab import Lab
from chapters.quantization import qat
from kernels import bench, check
from kernels.quantization import qat as kernel

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# All weights of the blocks rounded to signed codes (with 3 bits, −4 to 3, times a step), a step for each row, and
# nothing trained: `steps=0`. Perplexity against bits; dashed is full precision.

# %%
widths, found = (5, 4, 3, 2), []
for bits in widths:
    model = lab.model()
    qat.quantize_aware(model, lab.train_stream, steps=0, bits=bits)
    found.append(lab.perplexity(model))
drawn, axes = figure(height=2.6)
axes.plot(widths, found, **series("baseline"))
axes.axhline(lab.base_perplexity, **series("reference"))
axes.set(xlabel="bits for each weight", ylabel="perplexity", xticks=widths, title="rounded, not trained")
drawn

# %% [markdown]
# Every bit less costs more than the one before it, and two bits break the model.

# %%
assert found[-1] > 1.5 * lab.base_perplexity, "2 bits break it"
assert found[-1] > max(found[:-1])

# %% [markdown]
# ## The idea
#
# Rounding is a staircase. Its derivative is 0 nearly everywhere, and no gradient gets through. The straight-through
# estimator takes 1 where a number may still choose among the codes, and 0 where it is clipped: there a small change
# does nothing. Below, `lsq` at 2 bits with a step of s = 1, and the gradient that `lsq_gradient` lets pass. Turn the
# bits where the notebook is live: the more codes, the wider the range that lets gradients pass.


# %%
one = np.ones(1)


def staircase(bits=2):
    x = np.linspace(-1.5, 1.5, 601) * 2 ** (bits - 1)
    dx, _ = qat.lsq_gradient(x, one, np.ones_like(x), bits)
    drawn, axes = figure(height=2.8)
    axes.plot(x, qat.lsq(x, one, bits), color=COLOURS["method"], label="value / s")
    axes.plot(x, dx, color=COLOURS["baseline"], linestyle="--", label="gradient that passes")
    axes.set(xlabel="x / s", title=f"{2**bits} codes; the gradient passes between the ends")
    legend(axes)
    return drawn


# %% [markdown]
# The codes of 2 bits are −2, −1, 0 and 1, one more below zero than above. So is the range that lets gradients pass.

# %%
explore(staircase, bits=(2, 5))

# %% [markdown]
# The mask looks at x / s before it is rounded. A number at 1.3 rounds to the largest code, 1, and yet it is clipped.
# (`straight_through` is the mask of quantizers without a learned step; there a limit on |x| is given.)

# %%
assert qat.straight_through(np.array([-2.6, 0.3, 2.5]), np.ones(3), limit=2.5).tolist() == [0, 1, 0]
dx, _ = qat.lsq_gradient(np.array([1.0, 1.3]), one, np.ones(2), bits=2)
assert dx.tolist() == [1, 0] and qat.lsq_codes(np.array([1.0, 1.3]), one, bits=2).tolist() == [1, 1]

# %% [markdown]
# ## A step that is learned
#
# The step s is a parameter, too. To its gradient a number adds its rounding error where it is inside, and the whole
# code where it is clipped, each times the gradient dy that arrives there. The sum is divided by √(n · Qp), with n
# numbers and the largest code Qp, so that steps do not learn much faster than weights. With dy = 1 and one number, at 3
# bits (codes −4 to 3, divided by √3):

# %%
x = np.linspace(-6, 5, 1101)
each = [qat.lsq_gradient(np.array([number]), one, one, bits=3)[1][0] for number in x]
drawn, axes = figure(height=2.6)
axes.plot(x, each, color=COLOURS["method"])
axes.axhline(0, **series("reference"))
axes.set(xlabel="x / s", ylabel="share of ds", title="what is clipped pulls hardest")
assert np.isclose(min(each), -4 / 3**0.5) and np.isclose(each[-1], 3 / 3**0.5) and each[-1] == max(each)
drawn

# %% [markdown]
# A miniature: learn s for one row of real weights, with the squared error as loss. LSQ begins at the step 2 mean|w| /
# √Qp. Here numbers inside always ask for a smaller step and clipped ones for a larger, and it settles where they
# balance: near the least error, not at it, because a straight-through gradient is not a derivative. The paper finds the
# same in trained networks (section 3.6).

# %%
w = lab.model().blocks[0].attention.q_proj.weight[:1].double().numpy(force=True)
start = scale = qat.first_scale(w, bits=3)
for _ in range(100):
    scale = scale - 0.2 * qat.lsq_gradient(w, scale, 2 * (qat.lsq(w, scale, bits=3) - w), bits=3)[1]
candidates = np.append(np.linspace(0.3, 1.5, 60) * start, [start, scale])
errors = np.array([((qat.lsq(w, np.array([s]), bits=3) - w) ** 2).sum() for s in candidates])

# %% [markdown]
# On the curve of all steps' errors, the learned one stands near the bottom.

# %%
drawn, axes = figure(height=2.6)
axes.plot(candidates[:-2], errors[:-2], color=COLOURS["muted"])
for at, role, words in ((-2, "baseline", "first step"), (-1, "method", "learned step")):
    axes.plot(candidates[at], errors[at], **series(role) | {"linestyle": "", "markersize": 8}, label=words)
axes.set(xlabel="step s", ylabel="squared error of the row")
legend(axes)
assert errors[-1] < 1.5 * errors.min() < errors[0]
drawn

# %% [markdown]
# ## In the model, with a teacher
#
# `quantize_aware` puts a layer that rounds its weights in the place of every linear layer, trains weights and steps for
# a while, and leaves plain layers with rounded weights behind. The text says which token came next; the full-precision
# model, the teacher, says how likely each was. Learning from the latter costs one more forward pass a step. The claim
# trains at 2 bits, briefly. How much of the loss do you expect to come back?

# %%
claim = qat.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Training repairs most of it, and a teacher helps. That is a short training on one small model: how far a long one
# gets, and whether the teacher is then still ahead, the figure does not say.

# %%
assert claim.holds

# %% [markdown]
# One caution. A text alone also moves what needs no repair: trained so briefly at this learning rate, even a rounded
# model that had lost nothing would not stay where it was. So part of what the teacher brings is that it holds the model
# in place. At 8 bits that is all there is to see.

# %%
for teach in (False, True):
    model = lab.model()
    qat.quantize_aware(model, lab.train_stream, 30, bits=8, teach=teach)
    print(f"8 bits, {'with' if teach else 'without'} a teacher: {lab.perplexity(model) / lab.base_perplexity - 1:+.1%}")

# %% [markdown]
# ## The kernel, in bytes
#
# The forward pass reads a weight and writes its value; the backward pass reads weight and gradient and writes a
# gradient. In separate operators every quotient, mask and error is a matrix of its own.

# %%
naive = {"forward": 8 * 2, "backward": 20 * 2}  # bytes a weight in 16 bits, as the kernel's first lines count them
drawn, axes = figure(height=2.2)
for place, what in enumerate(naive):
    fused = kernel.llama_case(what, 4096, 4096, 4096)
    axes.barh(place + 0.2, naive[what] * 4096**2 / 1e6, 0.35, color=COLOURS["baseline"], label="in steps")
    axes.barh(place - 0.2, fused.bytes / 1e6, 0.35, color=COLOURS["method"], label="fused")
axes.set_yticks([0, 1], list(naive))
legend(axes, handles=axes.get_legend_handles_labels()[0][:2])
axes.set(xlabel="megabytes for a weight of 4096 × 4096")
drawn

# %% [markdown]
# The gradient of a step is a sum over its weights, here over many programs. They write their shares, and a second
# kernel adds them in a fixed order, so that training twice gives the same bits. What the compiler makes of it:

# %%
report = check.static_report("quantization.qat", [90])
for row in report:
    print(f"{row['case']:40} {row['kernel']:16} {row['registers']:3} registers, {row['load_bits']}-bit loads")
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside what torch offers for the same job:

# %%
for row in bench.recorded("quantization.qat"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.qat"):
    print("not recorded yet: python -m kernels bench quantization.qat, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Five functions are left to you: the codes, their gradients, the straight-through mask, ternary weights, and the
# backward kernel.
#
# ```
# python -m chapters exercise qat --to my
# python -m pytest --submission my tests/quantization/test_qat.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["qat"]):
    print(f"{exercise.points} points  {exercise.function}")
