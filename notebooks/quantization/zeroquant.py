# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # ZeroQuant: fine grids, and a teacher for every layer
#
# Rounding a trained model costs nothing but error. Training the rounded model again repairs much of it, and costs what
# training costs: labels, memory for the whole model's gradients, time. ZeroQuant stands between: grids for small groups
# of weights and for each token, and a short training of one layer at a time, which needs neither labels nor the model.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.quantization import zeroquant
from kernels import bench, check
from kernels.quantization import zeroquant as kernel
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# In 3 bits a weight is one of 8 values, evenly spaced on a grid. One grid for a whole weight matrix must span its
# largest weight. In groups of neighbours most grids are finer. `quantize` cuts the flattened matrix into as many groups
# as we ask for; here is the error of 3 bits for one layer of our model, beside the size of its weights.

# %%
weight = surgery.linears(lab.model())["blocks.0.feed_forward.down_proj"].weight.numpy(force=True)
errors = {}
for size in (weight.size, weight.shape[1], 64, 32, 16):
    held = zeroquant.quantize(weight, 3, weight.size // size)
    errors[size] = np.sqrt(np.mean((zeroquant.dequantize(*held) - weight) ** 2) / np.mean(weight**2))
assert errors[16] < errors[64] < errors[weight.size]

# %% [markdown]
# Smaller groups have smaller errors, and more scales to store. (384 weights are a row, 49,152 the whole matrix.)

# %%
drawn, axes = figure(height=2.6)
axes.plot(list(errors), list(errors.values()), **series("method"))
axes.set(xscale="log", ylim=(0, None), title="who shares a grid decides the error")
axes.set_xticks(list(errors), [f"{size:,}" for size in errors])
axes.minorticks_off()
axes.set(xlabel="weights that share a scale", ylabel="rms error / rms weight")
drawn

# %% [markdown]
# Activations are not known before they come, and tokens differ in size. Here is the distance of two neighbouring
# values, the step, that each of 128 tokens needs in 8 bits, from the smallest to the largest. How many would be content
# with less than half of the common step? A scale for each token fits each of them, and it can be taken out of the sum
# over channels, so the product may stay in integers.

# %%
name = "blocks.2.feed_forward.down_proj"
x = next(seen for _, seen in surgery.record_inputs(lab.model(), lab.calibration(count=1), [name]))[0].numpy()
largest = np.sort(np.abs(x).max(axis=1))
drawn, axes = figure(height=2.4)
axes.plot(largest / 128, color=COLOURS["method"], label="a step for each token")
axes.axhline(largest[-1] / 128, **series("baseline") | {"marker": ""}, label="one step for all")
axes.set(xlabel="token, sorted", ylabel="step of 8 bits", ylim=0)
legend(axes)
assert np.median(largest) < 0.8 * largest[-1]
drawn

# %% [markdown]
# ## The grid of the authors
#
# Their symmetric step is max|w| / 2^(bits − 1): the largest positive weight falls on a code that does not exist, and is
# clipped by one step, a fourth of it in 3 bits. The asymmetric grid spans what there is, and clips its end, too. Here
# are numbers from −0.4 to 1; turn the bits where the notebook is live.


# %%
def stairs(bits=3):
    numbers = np.linspace(-0.4, 1, 401)
    drawn, axes = figure(height=2.8)
    axes.plot(numbers, numbers, **series("reference"), label="not rounded")
    for role, words, symmetric in (("method", "symmetric", True), ("baseline", "asymmetric", False)):
        values = zeroquant.dequantize(*zeroquant.quantize(numbers, bits, symmetric=symmetric))
        axes.plot(numbers, values, **series(role) | {"marker": ""}, label=words)
        assert values.max() < 1, "both clip the end"
    axes.set(xlabel="number", ylabel=f"its value in {bits} bits")
    return drawn


# %% [markdown]
# Solid is symmetric, with steps of a fourth; dash-dotted asymmetric, with smaller ones, for it wastes none on what is
# below −0.4. At the right end both stay below the dashed line.

# %%
explore(stairs, bits=(2, 8))

# %% [markdown]
# ## What rounding loses
#
# `quantize_model` rounds all weights of the blocks to 3 bits, and what is multiplied with them to 8. Feed each rounded
# layer with what the full model's layer is fed, and compare the answers: that is a layer's own error, without its
# predecessors'.

# %%
teacher, student = lab.model(), lab.model()
zeroquant.quantize_model(student, bits=3)
unseen = lab.validation[:16]
before = zeroquant.layer_errors(student, teacher, unseen)
rounded = lab.perplexity(student)
print("error of each layer:", ", ".join(f"{error:.4f}" for error in before))
assert rounded > lab.base_perplexity

# %% [markdown]
# ## Layer-wise knowledge distillation
#
# Now lower exactly these errors. (A layer is a block here, attention and feed-forward.) Layer l of the student, the
# rounded model, is fed the hidden state l of the teacher, the full one; its target is the teacher's hidden state l + 1.
# Rounding has no useful gradient, so it is taken for the identity on the way back. A fresh AdamW for each layer, some
# dozens of steps, a hundred sequences of any text.

# %%
losses = zeroquant.distill_model(student, teacher, lab.calibration(), steps=60)
drawn, axes = figure(height=2.8)
for layer, (row, role) in enumerate(zip(losses, ("method", "baseline", "accent", "second"), strict=False)):
    means = (row / row[0]).reshape(6, 10).mean(axis=1)
    axes.plot(np.arange(5, 60, 10), means, **series(role), label=f"layer {layer}")
axes.set(xlabel="training step", ylabel="loss / first loss", ylim=0, title="every layer comes nearer to its teacher")
legend(axes, ncols=2)
drawn

# %% [markdown]
# Every layer answers better, on text that it was not trained on, too.

# %%
after = zeroquant.layer_errors(student, teacher, unseen)
assert (after < before).all()
for layer, share in enumerate(after / before):
    print(f"layer {layer}: {share:.0%} of its error is left")

# %% [markdown]
# What moved? The weights that training keeps in full precision moved by less than a step. But some of them crossed the
# border between two codes. Here is a corner of one matrix: the codes that are now larger, or smaller, than before.

# %%
layers = [surgery.linears(model)["blocks.1.feed_forward.up_proj"] for model in (teacher, student)]
kept = [layers[0].weight, layers[1].parametrizations.weight.original]
codes = [zeroquant.quantize(each.numpy(force=True), 3, each.numel() // zeroquant.GROUP)[0] for each in kept]
change = codes[1].astype(int) - codes[0]
drawn, axes = figure(height=2.8)
heatmap(axes, change.reshape(layers[0].weight.shape)[:32, :64], "change of the code", limit=1)
axes.set(xlabel="column", ylabel="row", title=f"{np.mean(change != 0):.1%} of the codes changed")
assert 0 < np.mean(change != 0) < 0.5
drawn

# %% [markdown]
# ## The whole model
#
# The claim repeats this (LKD is the layer-wise distillation), and asks what a model of better layers is worth. Each
# layer was trained on perfect inputs, which it will not have. Will the whole gain as much as its parts?

# %%
claim = zeroquant.claim(lab)
print(claim.sentence)
assert claim.holds and claim.numbers["loss won back, 3 bits"] > 0.3
claim.figure

# %% [markdown]
# It does gain: about half of what rounding loses is won back. Does one need the teacher's inputs? A student fed by its
# own rounded layers would have to repair their errors, too, and layers could no longer be trained apart. In the paper's
# way the errors of earlier layers pass through.
#
# ## The kernels: rounding for nothing
#
# A scale by token needs the maximum of a token before its first code: one more pass over memory, if rounding is a step
# of its own. Where the activation is made, its row is on chip anyway. And the norm has a present for us: it divides a
# row by one number, which changes the step and leaves every code alone.

# %%
tokens, gain = np.random.default_rng(0).normal(size=(2, 3, 8))
codes, scale, _ = zeroquant.rms_norm_quantize(tokens, gain[0], eps=1e-5)
other, larger, _ = zeroquant.rms_norm_quantize(tokens * 32, gain[0], eps=1e-5)
np.testing.assert_array_equal(codes, other)
normed = tokens / np.sqrt((tokens**2).mean(axis=1, keepdims=True) + 1e-5) * gain[0]
assert (np.abs(normed - codes * scale[:, None]) <= 1.01 * scale[:, None]).all()

# %% [markdown]
# Bytes moved for each value of 16 bits, in separate steps and fused: each input is read once, each result written once.

# %%
steps = {"norm with residual": (3 * 2 + 2 * 2 + 2 + 3, 7), "norm": (2 * 2 + 2 + 3, 3), "SwiGLU": (3 * 2 + 2 + 3, 5)}
drawn, axes = figure(height=2.4)
for at, role, words in ((1, "method", "fused"), (0, "baseline", "in steps")):
    places = np.arange(3) + 0.2 - 0.4 * at
    axes.barh(places, [count[at] for count in steps.values()], 0.4, color=COLOURS[role], label=words)
axes.set(xlabel="bytes moved for a value", yticks=range(3), yticklabels=list(steps))
legend(axes)
assert kernel.norm_case(4096, 4096, residual=True).bytes < 1.01 * steps["norm with residual"][1] * 4096**2
drawn

# %% [markdown]
# What the compiler makes of them for an H100 or H200 (sm_90): no spilled registers, loads of 128 bits.

# %%
report = check.static_report("quantization.zeroquant", [90])
for row in report:
    print(f"{row['case']:32} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside what torch offers for the same job:

# %%
for row in bench.recorded("quantization.zeroquant"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.zeroquant"):
    print("not recorded yet: python -m kernels bench quantization.zeroquant, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Five functions are left to you: the grids, the fused norm, the distillation, and two kernels.
#
# ```
# python -m chapters exercise zeroquant --to my
# python -m pytest --submission my tests/quantization/test_zeroquant.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["zeroquant"]):
    print(f"{exercise.points} points  {exercise.function}")
