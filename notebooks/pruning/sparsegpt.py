# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # SparseGPT: what goes is made up for by what stays
#
# Magnitude pruning and Wanda choose which weights go, and leave the others as they are. But the inputs of a layer are
# correlated: what one weight did, another can do in part, if it may move. How far, and which weight is then the
# cheapest to lose, was worked out thirty years ago for one weight at a time. SparseGPT does it for a whole layer.
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
from functools import partial

import numpy as np
import torch

from chapters import claims, workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.pruning import sparsegpt, wanda
from chapters.pruning.magnitude import layer_mask
from chapters.quantization import gptq
from chapters.shared.pruned_layers import prune_each
from chapters.sparsity.n_m import n_m_mask
from kernels import bench, cases, check, hardware
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
text = lab.calibration(0, 32)

# %% [markdown]
# ## What hurts
#
# Hardware can skip half of the weights if 2 of every 4 neighbours are zero. With so little choice magnitude drops
# weights that matter, and even Wanda, which multiplies each weight by the size of its inputs before it compares, costs
# the model a lot.

# %%
costs = {"dense": lab.base_perplexity}
model = lab.model()
prune_each(model, n_m_mask)
costs["magnitude, 2:4"] = lab.perplexity(model)
model = lab.model()
wanda.prune_model(model, text, partial(wanda.find_mask, sparsity=0.5, pattern=(2, 4)))
costs["Wanda, 2:4"] = lab.perplexity(model)

# %% [markdown]
# 2 of every 4, chosen by magnitude and by Wanda:

# %%
drawn, axes = figure(height=1.6)
axes.barh(list(costs), list(costs.values()), color=[COLOURS["muted"], COLOURS["baseline"], COLOURS["second"]])
axes.set(xlabel="perplexity")
axes.invert_yaxis()
assert costs["magnitude, 2:4"] > costs["Wanda, 2:4"] > 1.3 * costs["dense"]
drawn

# %% [markdown]
# ## Inputs are correlated
#
# Let X be the inputs of a layer, one row for each token, W its weight and Ŵ what is left of W. The layer is judged by
# its outputs: the error is ‖X (W − Ŵ)ᵀ‖². That is a quadratic form in each row of W, and its matrix of second
# derivatives, the Hessian, is H = 2 XᵀX (over the number of sequences). On its diagonal stands how large each input is,
# which is all that Wanda knows. Off the diagonal stands which inputs come together. A corner of one layer's, scaled to
# correlations, without the ones of the diagonal: some pairs are clearly correlated.

# %%
name = "blocks.1.attention.v_proj"
statistics = gptq.hessians(lab.model(), text, [name])[name]
spread = np.sqrt(np.diag(statistics))
correlation = statistics / np.outer(spread, spread)
off_diagonal = correlation - np.eye(len(correlation))
drawn, axes = figure(width=4.2, height=3.2)
heatmap(axes, np.abs(off_diagonal[:32, :32]), "|correlation|")
axes.set(xlabel="input", ylabel="input")
assert np.abs(off_diagonal).max() > 0.3
drawn

# %% [markdown]
# ## The ancestors: what does one weight cost?
#
# Let w be a row of W. By how much does the error grow if w_j becomes 0? Optimal Brain Damage (OBD): by ½ H_jj w_j², if
# all others stay. Optimal Brain Surgeon (OBS) lets them move as suits best, and then it is w_j² / (2 [H⁻¹]_jj). Take
# two inputs that nearly always come together, with weights 2 and 1. Losing the second weight looks expensive. What will
# the first one do? It takes over, and the loss is cheap.

# %%
twins = np.array([[1.0, 0.9], [0.9, 1.0]])
row, inverse = np.array([[2.0, 1.0]]), np.linalg.inv(twins)
damage, surgeon = sparsegpt.obd_scores(row, twins)[0, 1], sparsegpt.obs_scores(row, inverse)[0, 1]
moved, _ = sparsegpt.obs_step(row, inverse[None], np.array([1]))
print(f"OBD {damage:.3f}, OBS {surgeon:.3f}; the row becomes {moved[0]}")
change = row - moved
assert np.isclose((change @ twins @ change.T).item() / 2, surgeon) and surgeon < damage / 4

# %% [markdown]
# If the Hessian is diagonal, nothing can take over: both scores are the same, and they are Wanda's, squared.

# %%
norms = np.array([1.0, 3.0])
alone = np.diag(2 * norms**2)
scores = sparsegpt.obd_scores(row, alone), sparsegpt.obs_scores(row, np.linalg.inv(alone))
assert np.allclose(scores[0], scores[1]) and np.allclose(scores[0], wanda.scores(row, norms) ** 2)

# %% [markdown]
# ## One factor for all rows
#
# After a step of OBS each row has lost another weight and needs another inverse. SparseGPT fixes the order instead:
# columns from left to right, and what lies behind stays as it is. Then every row needs the inverse of the same part of
# the Hessian, that of the columns from j on. One upper triangular matrix U with H⁻¹ = UᵀU, a Cholesky factor, holds
# them all: U_jj² is the first element of the j-th inverse. (A little of the mean diagonal is added to H first, the
# damping, so that there is an inverse.)

# %%
weight = surgery.linears(lab.model())[name].weight.detach().double().numpy()
prepared, upper = sparsegpt.prepared(weight, statistics, damping=0.01)
damped = statistics + 0.01 * np.diag(statistics).mean() * np.eye(len(statistics))
for j in (0, 50, 127):
    assert np.isclose(upper[j, j] ** 2, np.linalg.inv(damped[j:, j:])[0, 0])
found = sparsegpt.sparsegpt(weight, statistics, exact=True)
change = weight - found.weight
assert np.isclose(found.error, (change @ damped * change).sum() / 2)

# %% [markdown]
# What does the repair look like? Here are 24 rows of the layer with all of their columns, grey where a weight was
# dropped. The colour of the others says how far they have moved: nothing in the first column, for there was no error to
# repair yet, and further to the right more and more. The more is dropped, the more the others have to move; in a live
# notebook, try it.


# %%
def repaired(zeros=50):
    pruned = sparsegpt.sparsegpt(weight, statistics, zeros / 100, exact=True)
    moved = np.where(pruned.weight == 0, np.nan, np.abs(pruned.weight - weight))
    drawn, axes = figure(width=8.0, height=2.6)
    heatmap(axes, moved[:24], "moved by", limit=0.08)
    axes.set(xlabel="input", ylabel="output", title=f"{zeros}% zeros: output error {pruned.error:.0f}")
    return drawn


explore(repaired, zeros=(10, 90, 10))

# %% [markdown]
# How much of the loss is the choice, and how much the repair? Half of that layer's weights go: by magnitude, by Wanda,
# by Wanda with the repair, by SparseGPT, and by OBS with an inverse for every row, which chooses best and repairs
# backwards, too. Before you read on: is choosing or repairing worth more?

# %%
by_wanda = wanda.prune_rows(weight, np.sqrt(np.diag(statistics) / 2), 64) != 0
left = {
    "magnitude": np.where(layer_mask(weight, 0.5), weight, 0),
    "Wanda": np.where(by_wanda, weight, 0),
    "Wanda, repaired": sparsegpt.solve_block(prepared, upper, by_wanda)[0],
    "SparseGPT": found.weight,
    "OBS": sparsegpt.obs(weight, statistics, 0.5).weight,
}
losses = {rule: ((weight - kept) @ damped * (weight - kept)).sum() / 2 for rule, kept in left.items()}

# %% [markdown]
# The bars are the error of the outputs. The repair takes away much of it, whoever chose. All drop the same count.

# %%
drawn, axes = figure(height=2.4)
axes.barh([*losses], [*losses.values()], color=[COLOURS["baseline"]] * 2 + [COLOURS["method"]] * 2 + [COLOURS["muted"]])
axes.set(xlabel="output error, ½ Σ (w − ŵ) H (w − ŵ)ᵀ over the rows", title="the same zeros, repaired or not")
axes.invert_yaxis()
assert losses["Wanda"] > losses["Wanda, repaired"] > losses["OBS"] and losses["Wanda"] > losses["SparseGPT"]
assert len({int((kept == 0).sum()) for kept in left.values()}) == 1
drawn

# %% [markdown]
# ## Which go: a threshold for each block, or a group at a time
#
# Without a pattern the mask of a block of 128 columns is fixed when their turn comes, over all rows together, from
# weights that have been repaired so far. The published code drops one weight more than ⌊s n⌋ of the n in each block, s
# being the share of zeros; `exact=True` drops just that many. (Its mask is True where a weight goes.) In a pattern each
# group of four is chosen when its first column is reached, as late as can be, and blocks only make it faster.

# %%
score = np.array([[5.0, 1.0, 3.0, 2.0]])
print(sparsegpt.threshold_mask(score, 0.5), sparsegpt.threshold_mask(score, 0.5, exact=True))
assert sparsegpt.threshold_mask(score, 0.5).sum() == 1 and sparsegpt.threshold_mask(score, 0.5, exact=True).sum() == 2
blocks = [sparsegpt.sparsegpt(weight, statistics, pattern=(2, 4), block_size=size).error for size in (16, 128)]
assert np.isclose(*blocks)

# %% [markdown]
# ## In the model
#
# The blocks of the model in order, each calibrated on what the pruned ones before it let through. Wanda and SparseGPT
# see the same text, and all three methods drop the same count. Where do you expect the repair to matter most: where any
# half of the weights may go, or where 2 of every 4 must?

# %%
rules = {rule: sparsegpt.RULES[rule] for rule in ("50%", "4:8", "2:4")}
curves = {method: [] for method in ("magnitude", "Wanda", "SparseGPT")}
for sparsity, pattern in rules.values():
    models = {method: lab.model() for method in curves}
    by_size = partial(n_m_mask, n=pattern[0], m=pattern[1]) if pattern else partial(layer_mask, sparsity=sparsity)
    prune_each(models["magnitude"], by_size)
    wanda.prune_model(models["Wanda"], text, partial(wanda.find_mask, sparsity=sparsity, pattern=pattern))
    sparsegpt.prune_model(models["SparseGPT"], text, sparsity=sparsity, pattern=pattern, exact=True)
    for method, pruned in models.items():
        curves[method].append(lab.perplexity(pruned))

# %% [markdown]
# The less choice there is, the more the repair is worth: at 2:4 even good weights have to go, and others can take over.

# %%
drawn, axes = figure()
for method, values in curves.items():
    axes.plot([*rules], values, **series(sparsegpt.ROLES[method]), label=method)[0].set(linestyle="")
axes.axhline(lab.base_perplexity, **series("reference"), label="dense")
axes.set(xlabel="half of the weights go: anywhere, or n:m kept", ylabel="perplexity", title="scarce choice, wide gaps")
legend(axes)
assert curves["SparseGPT"][2] < curves["Wanda"][2] < curves["magnitude"][2]
assert curves["SparseGPT"][2] - curves["SparseGPT"][0] < curves["Wanda"][2] - curves["Wanda"][0]
drawn

# %% [markdown]
# The recorded measurement, three seeds of calibration text, over the share of zeros. (It is measured on more text, so
# its dense model has another perplexity.) At 30% all three are about as good; at 70% only SparseGPT still has a model
# to show. None of them trains, so this says nothing about what a model that trains on after pruning would reach.

# %%
record = claims.recorded("sparsegpt")
print(record["sentence"])
drawn, axes = figure()
for method, role in sparsegpt.ROLES.items():
    axes.plot((30, 50, 70), [record["numbers"][f"{method}, {s}%"] for s in (30, 50, 70)], **series(role), label=method)
axes.axhline(record["numbers"]["perplexity, dense"], **series("reference"), label="dense")
axes.set(xlabel="zeros (%), any weight may go", ylabel="perplexity", yscale="log")
legend(axes)
assert record["numbers"]["SparseGPT, 70%"] < record["numbers"]["Wanda, 70%"]
drawn

# %% [markdown]
# ## Drop and round in one pass
#
# An error is an error: what stays can be rounded to a grid in the same pass, and the columns to the right repair both.
# Half zeros and 4 bits take about as much room as 3 bits: 1 for the map of what is there, 4 for each of half the
# weights. The paper finds them better than 3 bits on the largest models. What do you expect of a small one?

# %%
joint, rounded = lab.model(), lab.model()
sparsegpt.prune_model(joint, text, bits=4)
gptq.quantize_model(rounded, text, bits=3)
print(f"50% and 4 bits, {sparsegpt.coded_bits(joint, 4):.2f} bits a weight: perplexity {lab.perplexity(joint):.1f}")
print(f"GPTQ, 3 bits and a grid for each row: perplexity {lab.perplexity(rounded):.1f}")
assert sparsegpt.coded_bits(joint, 4) < 3.2 and lab.perplexity(joint) < 1.5 * lab.base_perplexity

# %% [markdown]
# If 3 bits come out ahead here, that does not contradict the paper: a small model has fewer weights to spare, and
# dropping half of them costs it more than a large one.
#
# ## The kernel: a block of columns stays on chip
#
# In torch each column is a few launches, and each of them reads and writes the rest of the block: in float32, 128
# columns times 4 bytes in and out, and half of the block on average. The kernel holds a tile of rows in registers over
# all 128 columns: W is read once (4 bytes a weight), the mask with it or, in a pattern, written (1), Ŵ and the errors
# are written once (8), and U is read (4 bytes a number). In a pattern it also chooses: a score is picked out and
# compared with the whole tile, and what fewer than n of its group beat stays.

# %%
rows, width = 4096, 128
fused = 13 * rows * width + 4 * width**2
torch_way = 4 * rows * width**2
print(f"fused {fused / 1e6:.1f} MB, column by column {torch_way / 1e6:.0f} MB")
assert torch_way > 30 * fused
for case in cases.cases("pruning.sparsegpt"):
    floor = 1e6 * case.bytes / hardware.GPUS["H200"].bandwidth
    print(f"{case.name:40} {case.bytes / 1e6:5.1f} MB, at least {floor:.1f} µs on an H200")

# %% [markdown]
# The floor is far away: the steps of a block wait for each other, 128 in a row. What can be had is that nothing spills
# and that loads are wide, which the machine code shows without a GPU.

# %%
report = check.static_report("pruning.sparsegpt", [90])
for line in report:
    print(f"{line['case']:40} {line['registers']:3} registers, {line['load_bits']}-bit loads, "
          f"{line['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(line["failures"] for line in report)

# %% [markdown]
# And timed on a GPU, beside torch, column by column:

# %%
for line in bench.recorded("pruning.sparsegpt"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in line.get("peers_us", {}).items())
    print(f"{line['gpu']}, {line['case']}: {line.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("pruning.sparsegpt"):
    print("not recorded yet: python -m kernels bench sparsegpt, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the step of OBS, the mask of a block, the columns of a block, the blocks of a
# layer, and the kernel.
#
# ```
# python -m chapters exercise sparsegpt --to my
# python -m pytest --submission my tests/pruning/test_sparsegpt.py
# ```
#
# And to prune a model of your own:
#
# ```
# python -m chapters run sparsegpt --model PATH --pattern 2:4 --save pruned
# python -m minitfm generate --model pruned
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["sparsegpt"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["sparsegpt"])) == 5
