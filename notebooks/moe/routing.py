# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Routing: who works on which token?
#
# A transformer that knows more has more weights, and usually spends all of them on every token. A mixture of experts
# has several feed-forward layers side by side and sends each token to a few of them. Then weights and operations are
# no longer the same thing. What decides is a small gate, and this notebook is about what can go wrong with it: lines
# too long, experts idle, tokens dropped, and a gate that gives everything to its favourites.

# %%
from dataclasses import replace

import numpy as np
import torch

from chapters import claims, workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.moe import routing
from chapters.shared import moe_lab
from kernels import bench, cases, check

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Two thirds of the weights in a block of Llama-7B are in its feed-forward layer, three matrices of 4096 × 11008. Give
# it E times the width, and each token costs E times the operations there. Cut it into E experts of the old width and
# let a token visit two of them: the weights grow as before, the operations stop at two layers' worth.

# %%
experts = 2 ** np.arange(7)
layer = 3 * 4096 * 11008
drawn, axes = figure(height=2.8)
axes.plot(experts, 2 * layer * experts / 1e9, **series("baseline"), label="one wide layer")
axes.plot(experts, 2 * layer * np.minimum(experts, 2) / 1e9, **series("method"), label="2 of E experts")
axes.set(xlabel="weights, in layers of Llama-7B", ylabel="Gflop for a token", xscale="log", yscale="log")
axes.set_title("more weights, not more work")
legend(axes)
drawn

# %% [markdown]
# ## The idea
#
# The gate is a matrix that turns a token into one score for each expert, its logits; softmax makes them shares p.
# `choose` takes the k best. Of equal scores the lower expert wins, so that the same input always goes the same way.
# Here are four tokens (rows), three experts (columns) and k = 2.

# %%
logits = np.array([[2.0, 1.0, 0.0], [1.5, 0.5, 1.0], [1.0, 1.0, -1.0], [0.0, 0.5, 2.0]])
p = routing.softmax(logits)
expert = routing.choose(p, 2)
print(p.round(2), expert, sep="\n")
assert expert.tolist() == [[0, 1], [0, 2], [0, 1], [2, 1]]

# %% [markdown]
# ## Lines
#
# Every expert serves its tokens one after the other, and a token's slot is its place in that line, from 0. Who comes
# first? Most codes serve by choice: every token's first choice before any second one. Others go token by token. Count
# tokens and experts from 0: expert 2 is the second choice of token 1 and the first choice of token 3. By choice token 3
# comes first, by token it is token 1. (Below, a row for each token, a column for each of its choices.)

# %%
by_choice, load = routing.queue(expert, 3, "choice")
by_token, _ = routing.queue(expert, 3, "token")
print(by_choice, by_token, load, sep="\n")
assert by_choice[3, 0] == 0 and by_token[3, 0] == 1
assert load.tolist() == [3, 3, 2]

# %% [markdown]
# Experts live on devices, and devices like matrices of a known size. So each expert has room for a number of tokens,
# its capacity C = factor · k · tokens / experts: with a capacity factor of 1 just its fair share. The papers, DeepSpeed
# and V-MoE make C whole by three different rules, as printed below. Who finds C tokens before it in the line is
# dropped: this expert contributes nothing, and if all of a token's experts drop it, the layer's output is 0 and the
# residual carries the token on as it was.

# %%
rules = {"round": {}, "ceil, at least 4": {"least": 4}, "ceil, a multiple of 4": {"multiple": 4}}
for words, more in rules.items():
    print(f"{words}: {routing.capacity(4, 3, 2, rule=words.split(',')[0], **more)} places")
kept = by_choice < routing.capacity(4, 3, 2, factor=0.5)
print(kept)
assert kept.sum() == 3

# %% [markdown]
# ## Weights
#
# An expert's output is multiplied by the gate's share for it. Two of three shares do not sum to 1, and once some are
# dropped there are three published answers to that: leave them, divide by their sum before dropping, or after. With
# "before", a token that lost an expert is left with less than 1; with "after", the expert that remains gets it all.

# %%
for rule in ("never", "before", "after"):
    print(rule, routing.weigh(p, expert, kept, rule).round(2), sep="\n")
assert (routing.weigh(p, expert, kept, "after").sum(axis=1).round(9) == kept.any(axis=1)).all()

# %% [markdown]
# Bad input never becomes a quiet default: more choices than experts, no room at all, logits that are not numbers.

# %%
for bad in ({"k": 4}, {"k": 1, "capacity": 0}, {"k": 1, "noise": logits * np.nan}):
    try:
        routing.route(logits, **bad)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## What happens in training
#
# An expert that is a little better gets more tokens, so it learns faster, so it gets still more. Where will that end?
# The balance loss works against it. It multiplies each expert's share of the choices, which has no gradient, by its
# mean gate, which has one, and is least where both are even. Two small models learn from random weights on the same
# text, one without the loss and one with it. (A hundred steps; the recorded claim trains longer and three times.)

# %%
models = {words: routing.fresh(lab, gate, 100, seed=0) for words, gate in routing.GATES.items()}
found = {words: moe_lab.measure(model, lab.validation) for words, model in models.items()}
before, after = found.values()
assert (before.imbalance > after.imbalance).all() and before.dropped.mean() > after.dropped.mean()

# %% [markdown]
# Their loads on text that neither has seen. Each row is a layer, each column an expert, sorted; even would be 12.5%
# everywhere. Without the loss whole columns are dark: experts that nobody visits, weights that nobody uses.

# %%
drawn, axes = panels(2, width=7.6, height=2.4)
for place, (words, counted) in zip(axes, found.items(), strict=True):
    shares = 100 * counted.load / counted.load.sum(1, keepdim=True)
    heatmap(place, shares.sort(1, descending=True).values.numpy(), "% of the choices", limit=50, digits=0)
    place.set(title=words, xlabel="expert, fullest first", ylabel="layer")
drawn

# %% [markdown]
# ## Which expert takes which token
#
# Sixteen sequences are routed together. We look at the last of them, in the last layer of the balanced model. It stands
# at the end of all lines, which are first come, first served. With room for the fair share, what will it find?

# %%
model, places = models["balance loss"], 48
moes = [module for module in model.modules() if isinstance(module, moe_lab.MoE)]


def decisions(factor):
    moe_lab.set_policy(model, replace(routing.GATES["balance loss"], factor=factor))
    with torch.no_grad():
        model(lab.validation[:16])
    moe_lab.set_policy(model, routing.GATES["balance loss"])
    return moes[-1].routing


# %% [markdown]
# A dot where an expert takes a token, a cross where it had no room: some lines are full before this sequence comes.
# Where the crosses stand depends on the other sequences, a strange thing for a model to depend on. The chapter on batch
# priority is about that. In a live notebook, give the experts more room or less.


# %%
def served(factor=1.0):
    found = decisions(factor)
    drawn, axes = figure(width=8.0, height=2.6)
    for stays, marker, role, words in ((True, "o", "method", "taken"), (False, "x", "accent", "dropped")):
        token, choice = (found.kept[-places:] == stays).nonzero(as_tuple=True)
        expert = found.expert[-places:][token, choice]
        axes.scatter(token, expert, marker=marker, s=22, color=COLOURS[role], label=f"{words}: {len(token)}")
    axes.set(xlabel="token of the sequence", ylabel="expert", yticks=range(8), title=f"capacity factor {factor}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return drawn


# %% [markdown]
# At capacity factor 1:

# %%
assert decisions(1.0).load.sum() == 2 * lab.validation[:16].numel()
explore(served, factor=[0.25, 0.5, 1.0, 1.25, 2.0, 4.0])

# %% [markdown]
# ## Dropped, by capacity
#
# The same two models with more or less room: on the left how long the lines are, on the right what share of the choices
# is dropped. A balanced gate needs little more than the fair share. One that has collapsed needs room for all its
# tokens at a few experts, which is the work of the wide layer again, done by two devices while the others wait.

# %%
moe_lab.draw(models, lab.validation[:16])

# %% [markdown]
# And what does it do to the text? After so few steps, and from one seed, this says little:

# %%
for words, model in models.items():
    print(f"{words}: perplexity {lab.perplexity(model):.0f}, {found[words].dropped.mean():.0%} of the choices dropped")
assert all(lab.perplexity(model) < lab.config.vocab_size for model in models.values())

# %% [markdown]
# The recorded claim trains longer and three times, on the same text:

# %%
record = claims.recorded("routing")
print(record["sentence"] if record else "not recorded yet: python -m chapters claim routing --full")
assert record is None or record["numbers"]["dropped choices, balance loss"] < 0.5

# %% [markdown]
# So the loss is worth its price, for such small models; what it does for large ones this does not say.
#
# ## The losses
#
# In numbers: the balance loss is 1 for even lines, and the number of experts when one gets everything. The z loss
# keeps logits small: softmax does not change when a constant is added to all of them, floats do.

# %%
even, alone = np.full((8, 8), 1 / 8), np.eye(8)[np.zeros(8, int)]
assert routing.balance_loss(even, np.arange(8)[:, None]) == 1
assert routing.balance_loss(alone, np.zeros((8, 1), int)) == 8
np.testing.assert_allclose(routing.softmax(logits + 1000), p)
assert routing.z_loss(logits) < routing.z_loss(logits + 1) < routing.z_loss(logits + 1000)
print([round(routing.z_loss(logits + shift), 1) for shift in (0, 1, 10, 100)])

# %% [markdown]
# ## The kernel, in bytes
#
# In plain torch this is a softmax, a sort, and for each choice a one-hot matrix of 64-bit integers and its running
# sum, a dozen launches for a few kilobytes of logits. For 4096 tokens and 8 experts, the least that has to move, and
# what one-hot matrices and their sums move (each written once and read once):

# %%
case = cases.cases("moe.routing")[0]
naive = 2 * 4 * 8 * 4096 * 8
print(f"{case.name}: at least {case.bytes / 1e3:.0f} kB; one-hot matrices move {naive / 1e3:.0f} kB")
assert naive > 10 * case.bytes

# %% [markdown]
# A slot depends on all tokens before, and a second choice on everybody's first: that is why it takes so many launches,
# since a launch is where all wait for all. The kernel has its waiting inside. Half of its programs count, the other
# half wait until all counts are there, add them up and place their tokens. Each draws a ticket when it starts, and the
# first tickets count; so whoever is waited for is already at work, and the wait ends. Counts are added in one order, so
# the slots are those of first come, first served, whoever was faster.

# %%
counts = np.array([[3, 1], [0, 2], [2, 2]])  # of two experts, by three programs of the first half
ahead = np.cumsum(counts, axis=0) - counts
print(ahead)  # what each program of the second half adds to the places in its own block
assert ahead.tolist() == [[0, 0], [3, 1], [3, 3]]

# %% [markdown]
# What the compiler makes of it, seen without a GPU (here for an H100 or H200, sm_90):

# %%
report = check.static_report("moe.routing", [90])
for row in report:
    print(f"{row['case']:36} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the one-hot matrices:

# %%
for row in bench.recorded("moe.routing"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("moe.routing"):
    print("not recorded yet: python -m kernels bench moe.routing, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the capacity, the lines, the weights, the balance loss, and the kernel's placing.
#
# ```
# python -m chapters exercise routing --to my
# python -m pytest --submission my tests/moe/test_routing.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.moe
# chapters.moe.__path__.insert(0, "../../my/chapters/moe")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["routing"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["routing"])) == 5
