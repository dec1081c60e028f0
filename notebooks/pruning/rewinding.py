# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Rewinding: which end of training to repeat
#
# A model that has lost most of its weights is broken. Training repairs it, and pruned models are nearly always trained
# again. But how? One can go on gently from the weights that are left, at a small rate. Or one can go back: to an
# earlier step's weights, or only to its learning rates. That choice costs nothing, and it decides how many weights may
# go.
#
# What is pruned below is the book's base model, a small transformer that was trained on documentation; what is trained
# is a model of half its width.

# %%
import copy

import numpy as np
import torch

from chapters import claims, workbook
from chapters.figures import COLOURS, figure, legend, panels, series
from chapters.lab import Lab
from chapters.pruning import magnitude, rewinding
from chapters.shared import pruned_layers
from chapters.shared.retraining import MaskedAdamW, Plan, Stages, trained_small
from kernels import bench, cases, check, hardware
from minitfm import evaluate, surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Take the base model, set all weights below one threshold to zero, and do not train again. How much worse is it when
# 30%, 50%, 70% or 80% of the weights are gone?

# %%
sparsities = (0.3, 0.5, 0.7, 0.8)
worse = []
for sparsity in sparsities:
    model = lab.model()
    magnitude.prune_model(model, sparsity, "global")
    worse.append(lab.perplexity(model) / lab.base_perplexity)
assert worse[0] < 1.2 and worse[-1] > 5

# %% [markdown]
# The scale is logarithmic, or nothing could be read: where half of the weights are gone the model is a little worse,
# where most are gone it is no model any more.

# %%
drawn, axes = figure(height=2.8)
axes.plot([100 * s for s in sparsities], worse, **series("baseline"))
axes.set(xlabel="zeros (%), no retraining", ylabel="perplexity / dense", yscale="log")
axes.set_title(f"at {sparsities[-1]:.0%} zeros, {worse[-1]:,.0f} times the perplexity")
drawn

# %% [markdown]
# ## Four ways back
#
# A training run had a schedule of learning rates: up, and down to zero. Call the weights after its step s W[s]; here
# the run has 80 steps, so W[80] are the final ones. Retraining starts from the weights of one step and repeats a part
# of the schedule. `retraining_rates` says which part. The *lottery ticket* starts over from the first weights, W[0].
# *Weight rewinding* goes back t steps. *Learning-rate rewinding* (lr) replays the rates of these t steps but keeps the
# final weights. *Fine-tuning* goes on from the final weights at one small rate.

# %%
plan, starts = Plan(steps=80, replayed=40), {}
drawn, axes = figure(height=3.0)
for method, role in zip(rewinding.METHODS, ("muted", "second", "method", "baseline"), strict=True):
    starts[method], rates = rewinding.retraining_rates(method, plan.rates, plan.replayed, plan.constant * plan.rate)
    line = axes.plot(np.arange(80 - len(rates), 80), rates, **series(role), label=f"{method}, from W[{starts[method]}]")
    line[0].set(marker="", linewidth=6 if method == "weight" else 2)
axes.set(xlabel="step of the schedule that is repeated", ylabel="learning rate", title="four ways back, t = 40")
legend(axes)
assert starts == {"lottery": 0, "weight": 40, "lr": 80, "fine-tuning": 80}
drawn

# %% [markdown]
# Weight rewinding and learning-rate rewinding lie on one line: they differ only in the weights. For weight rewinding
# somebody must have kept those of the middle of the run. Learning-rate rewinding asks for the finished model only.
#
# ## Which weights stay
#
# A mask says of each weight whether it stays (1) or is dropped (0). Masks come from the weights at the end of the run,
# by one threshold for all layers. What was dropped in an earlier round stays dropped, however large its weight is now.
# Here are two layers of three weights each, of which three may stay. The 9 is gone already, and of the equal ones (0.2)
# the first stays.

# %%
weights = [np.array([[9.0, -0.5, 0.2]]), np.array([0.3, -0.2, 0.2])]
masks = [np.array([[False, True, True]]), np.array([True, True, True])]
for mask in rewinding.next_masks(weights, masks, 3):
    print(mask.astype(int))
assert [mask.tolist() for mask in rewinding.next_masks(weights, masks, 3)] == [[[False, True, True]],
                                                                              [True, False, False]]  # fmt: skip

# %% [markdown]
# ## How many
#
# All at once, or in rounds with retraining in between: each round takes the same share of what is left, a fifth in the
# paper. Even a count can differ: open_lth, the published code of the lottery ticket, rounds up and then drops one more,
# because it keeps what is *above* an element of the sorted list. With large layers nobody notices. With small ones the
# two part.

# %%
ours, theirs = (rewinding.kept_counts(850, 0.2, 15, open_lth=rule) for rule in (False, True))
print(ours[:6], theirs[:6])
assert theirs[:6] == [850, 679, 542, 432, 344, 274] and ours[1] == 680
drawn, axes = figure(height=2.8)
axes.plot(ours, **series("method"), label="round(left / 5) go")
axes.plot(theirs, **series("baseline"), label="open_lth: ⌈left / 5⌉ + 1 go")
axes.set(xlabel="round", ylabel="weights left of 850", yscale="log", title=f"at the end {ours[-1]} or {theirs[-1]}")
legend(axes)
drawn

# %% [markdown]
# ## Training must not wake what is dropped
#
# Set a weight to zero and train on, and it comes back: it has a gradient, and Adam has its moments, running means of
# past gradients and of their squares. Is it enough to set its gradient to zero as well? No, for the moments of the last
# steps still push. So the optimizer knows the mask: of what is dropped, gradient, moments and weight are 0. Three ways
# to step a weight that was just dropped, with a moment left:

# %%
dropped, gradient, moment, square = (np.array([x]) for x in (0.0, 0.4, 0.3, 0.2))
gone, all_kept = np.array([False]), np.array([True])
ways = {
    "no mask": rewinding.masked_adamw(dropped, gradient, all_kept, moment, square, 10, 0.1),
    "gradient masked": rewinding.masked_adamw(dropped, 0 * gradient, all_kept, moment, square, 10, 0.1),
    "masked step": rewinding.masked_adamw(dropped, gradient, gone, moment, square, 10, 0.1),
}
for how, (weight, mean, _) in ways.items():
    print(f"{how:16} weight {weight[0]:+.4f}, moment {mean[0]:+.4f}")
assert ways["gradient masked"][0] != 0 and ways["masked step"][0] == 0 == ways["masked step"][1]

# %% [markdown]
# `MaskedAdamW` is torch's AdamW with that step. In training it takes the place of the usual one. Below, the second and
# the fourth number are masked; not even a gradient that is no number can wake them.

# %%
parameter = torch.nn.Parameter(torch.arange(4.0))
optimizer = MaskedAdamW([{"params": [parameter], "lr": 0.1}], {parameter: torch.tensor([True, False, True, False])})
for _ in range(3):
    parameter.grad = torch.tensor([1.0, 1.0, -1.0, float("nan")])
    optimizer.step()
print(parameter.tolist())
assert parameter[1] == parameter[3] == 0 and parameter[2] > 2

# %% [markdown]
# ## A run in small
#
# A model of half the base model's width is trained for a few steps, half of its weights are pruned at once, and it is
# retrained in two ways. That is far too short to compare methods, but long enough to see the parts work: exact counts,
# and zeros that stay. (Why not four fifths? The matrices that write into the residual stream, o and down, start at zero
# and are still small after so few steps. One threshold for all would leave nothing of them, and no layer would learn.)

# %%
model, held = trained_small(lab, plan)
total = sum(layer.weight.numel() for layer in surgery.linears(model).values())
repaired, ends = {}, {}
for method in ("lr", "fine-tuning"):
    pruned = copy.deepcopy(model)
    rewinding.prune_and_retrain(pruned, held, method, [total // 2], lab.train_stream, plan, Stages())
    repaired[method] = evaluate.perplexity(pruned, lab.validation[:16])
    ends[method] = surgery.linears(pruned)["blocks.1.feed_forward.up_proj"].weight.detach()
    assert pruned_layers.count_kept(pruned_layers.nonzero_masks(pruned)) == (total // 2, total)
print(f"{total // 2} of {total} weights", {method: f"perplexity {value:.0f}" for method, value in repaired.items()})

# %% [markdown]
# What does a rate do? Each dot below is a weight of one layer that stayed, and its height is how far retraining has
# moved it.

# %%
before = surgery.linears(model)["blocks.1.feed_forward.up_proj"].weight.detach()
drawn, axes = panels(2, width=7.2, height=2.6, sharex=True, sharey=True)
far = {method: (after - before)[after != 0].abs().mean().item() for method, after in ends.items()}
for place, (method, after) in zip(axes, ends.items(), strict=True):
    place.plot(before[after != 0], (after - before)[after != 0], ".", markersize=2, color=COLOURS["method"])
    place.set(xlabel="weight before", title=f"{method}: by {far[method]:.4f} in the mean")
axes[0].set_ylabel("moved by")
assert far["lr"] > 2 * far["fine-tuning"]
drawn

# %% [markdown]
# The small rate leaves the weights nearly where they were; the replayed ones, which begin high, let them find new
# places.
#
# Long runs are killed now and then. So a run may be given a folder: finished stages are kept, and a stage under way is
# continued from its state, bit for bit as if nothing had happened (`run rewinding --state FOLDER`).
#
# ## What the methods are worth
#
# The recorded measurement, three seeds. Learning-rate rewinding and weight rewinding repeat high rates, which can move
# the weights that stay to where they are needed now. Fine-tuning at 1% of the highest rate, which is where schedules
# end, cannot. Give it ten times that rate, and with fewer zeros it is about as good as weight rewinding; with more it
# falls behind again.

# %%
record = claims.recorded("rewinding")
print(record["sentence"])
numbers = record["numbers"]
lr, fine = ([numbers[f"perplexity, {words}, 90%"] for words in some] for some in ([rewinding.LR], rewinding.FINE))
assert lr[0] < min(fine)

# %% [markdown]
# In bars, each a mean over the seeds (the percent behind fine-tuning is its share of the highest rate):

# %%
drawn, axes = panels(2, width=8.0, height=2.4, sharey=True)
for place, share in zip(axes, ("80%", "90%"), strict=True):
    heights = [numbers[f"perplexity, {words}, {share}"] for words in rewinding.VARIANTS]
    place.barh([*rewinding.VARIANTS], heights, color=[COLOURS[role] for role in rewinding.ROLES])
    place.axvline(numbers[f"perplexity, {rewinding.DENSE}"], color=COLOURS["reference"], linestyle="--")
    place.set(xlabel="perplexity (dashed: dense)", title=f"{share} zeros")
axes[0].set_yticks(range(4), ["lr rewinding", "weight rewinding", "fine-tuning, 1%", "fine-tuning, 10%"])
axes[0].invert_yaxis()
drawn

# %% [markdown]
# And, of one seed, what to see these beside. Retraining makes a run longer, so a dense model has to be given the same
# steps before anyone says that pruning helps. Two rounds have twice the steps of one. And the lottery ticket repeats
# the whole run, the high rates of its beginning too: where a run is as short as this one, that alone is worth much.

# %%
beside = ("dense", "lottery", "lr rewinding in two")
for words, value in numbers.items():
    if words.removeprefix("perplexity, ").startswith(beside):
        print(f"{words.removeprefix('perplexity, ')}: {value:.1f}")
assert sum(words.removeprefix("perplexity, ").startswith(beside) for words in numbers) == 4

# %% [markdown]
# ## The kernel's idea: one pass
#
# A step of AdamW waits for memory, not for arithmetic. It reads weight, gradient and two moments and writes all but the
# gradient: seven times 4 bytes, 28 for each weight. Masking gradient and weight in passes of their own reads and writes
# both once more and the mask twice, 18 bytes. The kernel reads the mask along with the rest, a bit for each weight.
# Bytes for a layer of Llama, and what an H200 needs for them at the least, at its 4.8 TB/s:

# %%
for case in cases.cases("pruning.rewinding"):
    floor = 1e6 * case.bytes / hardware.GPUS["H200"].bandwidth
    print(f"{case.name:22} {case.bytes / 1e6:7.1f} MB, at least {floor:.0f} µs")
sizes = {case.name: case.bytes / 4096**2 for case in cases.cases("pruning.rewinding")}
assert sizes["bits N=4096 K=4096"] == 28.125 and sizes["bool N=4096 K=4096"] == 29

# %% [markdown]
# What the compiler makes of it, for an H100 or H200 (sm_90), without having one:

# %%
report = check.static_report("pruning.rewinding", [90])
for line in report:
    print(f"{line['case']:22} {line['registers']:3} registers, {line['load_bits']}-bit loads, "
          f"{line['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(line["failures"] for line in report)

# %% [markdown]
# And timed on a GPU, beside torch's fused AdamW with two passes that mask:

# %%
for line in bench.recorded("pruning.rewinding"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in line.get("peers_us", {}).items())
    print(f"{line['gpu']}, {line['case']}: {line.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("pruning.rewinding"):
    print("not recorded yet: python -m kernels bench rewinding, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: counts, rates, masks, the masked step, and the kernel of it.
#
# ```
# python -m chapters exercise rewinding --to my
# python -m pytest --submission my tests/pruning/test_rewinding.py
# ```
#
# And to prune and retrain a model of your own:
#
# ```
# python -m chapters run rewinding --model PATH --sparsity 0.8 --method lr --steps 200 --sequences 2048 --save pruned
# python -m minitfm generate --model pruned
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["rewinding"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["rewinding"])) == 5
