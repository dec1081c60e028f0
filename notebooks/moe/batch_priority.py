# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Batch priority: who may be left out?
#
# A mixture of experts sends each token to a few of several feed-forward layers, the experts. Experts have a fixed
# number of places, and whoever comes too late is dropped: the layer adds nothing to that token. The chapter on routing
# serves tokens as they stand in the batch. So the last sequences of a batch pay for it, whatever they say. This
# notebook changes one thing: the order of service.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.explore import explore
from chapters.figures import figure, legend, panels, series
from chapters.lab import Lab
from chapters.moe import batch_priority, routing
from chapters.moe.batch_priority import PriorityGate
from chapters.shared.moe_lab import MoE, set_policy
from kernels import bench, cases, check
from minitfm import evaluate

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# A small mixture of 8 experts, of which a token uses 2, trained with room for the fair share (capacity factor 1). Now
# give it a quarter of that, and measure by how much the loss of each sequence grows, by its place in the batch of 16.
# Who will pay?

# %%
model = routing.fresh(lab, routing.GATES["balance loss"], 100, seed=0)
first_come = PriorityGate(2, 0.25, "before", order="arrival")
roomy = PriorityGate(2, 4.0, "before", order="arrival")


def loss_by_place(gate):
    set_policy(model, gate)
    with torch.no_grad():
        losses = [evaluate.nll(model, rows).mean(1) for rows in lab.validation[:64].split(16)]
    return torch.stack(losses).mean(0).numpy()


costs = loss_by_place(first_come) - loss_by_place(roomy)
assert costs[-8:].mean() > costs[:2].mean()

# %% [markdown]
# The first sequences hardly notice, for they fill the experts. From then on there is no room for anybody: these tokens
# pass the layer as they were.

# %%
drawn, axes = figure(height=2.6)
axes.plot(range(1, 17), costs, **series("baseline"))
axes.set(xlabel="place of the sequence in the batch", ylabel="loss added (nats)", title="the last pay for all")
drawn

# %% [markdown]
# ## The idea
#
# Somebody must be left out, so let it be those who matter least. How sure the gate is of a token, its largest
# probability, also multiplies what the expert adds to it: where it is small, little is lost. So tokens are sorted by
# it, and stand in line in that order. Of equals the first goes first, and the same batch always goes the same way.

# %%
logits = np.array([[0.2, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
sure = routing.softmax(logits).max(axis=1)
order = batch_priority.priority(sure)
print(sure.round(2), order)
assert order.tolist() == [1, 3, 2, 4, 0]

# %% [markdown]
# Lines form in that order, and by choice as before: all first choices, then all second ones. With two places at each
# expert, first come would serve tokens 0 and 1 at expert 0; by priority tokens 1 and 2 have them.

# %%
by_priority, by_arrival = batch_priority.route(logits, 1, 2), routing.route(logits, 1, 2)
print(by_arrival.kept[:, 0], by_priority.kept[:, 0])
assert by_arrival.kept[:, 0].tolist() == [True, True, False, True, False]
assert by_priority.kept[:, 0].tolist() == [False, True, True, True, False]
assert by_priority.weight.sum() > by_arrival.weight.sum()

# %% [markdown]
# ## In the model
#
# Nothing has to be trained again: only the order changes. Here is who finds a place in the last layer: a row for each
# sequence of the batch, a column for each token, black where no expert has room for it. In a live notebook, change the
# room.


# %%
def left_out(factor=0.25):
    drawn, axes = panels(2, width=8.4, height=2.4)
    for place, order, title in zip(axes, ("arrival", "max"), ("first come", "batch priority"), strict=True):
        set_policy(model, PriorityGate(2, factor, "before", order=order))
        with torch.no_grad():
            model(lab.validation[:16])
        routed = [module for module in model.modules() if isinstance(module, MoE)][-1].routing
        place.imshow(~routed.kept.any(1).view(16, -1), cmap="Greys", interpolation="nearest", aspect="auto")
        place.set(xlabel="token", ylabel="sequence", xticks=[], yticks=[], title=f"{title}, factor {factor}")
    return drawn


# %% [markdown]
# First come, first served fills a wall: from some sequence on there is black and little else. By priority those who are
# left out are spread over all sequences.

# %%
explore(left_out, factor=[0.125, 0.25, 0.5, 1.0])

# %% [markdown]
# The same model, the same quarter of the room, and the cost by place once more.

# %%
fair = loss_by_place(PriorityGate(2, 0.25, "before")) - loss_by_place(roomy)
drawn, axes = figure(height=2.6)
axes.plot(range(1, 17), costs, **series("baseline"), label="first come")
axes.plot(range(1, 17), fair, **series("method"), label="batch priority")
axes.set(xlabel="place of the sequence in the batch", ylabel="loss added (nats)", title="the same room, another order")
legend(axes)
assert np.ptp(fair) < np.ptp(costs) and fair.mean() < costs.mean()
drawn

# %% [markdown]
# Two things happened. The cost no longer depends on the place, and there is less of it. To tell them apart, a third
# order: at random. It spreads the cost as well, but does not ask whom it hits. By how much is perplexity higher than
# with priority, at each capacity factor?

# %%
found = batch_priority.sweep(model, lab.validation[:32])
priority, first, random = found[:, :, 0]
for words, other in (("first come", first), ("random order", random)):
    higher = zip(batch_priority.FACTORS, 100 * (other / priority - 1), strict=True)
    print(f"{words}:", ", ".join(f"{percent:+.1f}% at {factor}" for factor, percent in higher))
assert (first[:2] > random[:2]).all() and (random[:2] > priority[:2]).all()
assert abs(first[-1] / priority[-1] - 1) < 0.02

# %% [markdown]
# Where there is room for the fair share, the lines differ little: few are dropped, and it does not matter who. The mass
# that is kept differs little everywhere: so young a gate gives its favourites hardly more than the even share of 1/8.
# What its order is worth shows in the perplexity all the same.

# %%
batch_priority.draw(found)

# %% [markdown]
# The recorded claim trains three models for longer:

# %%
record = claims.recorded("batch_priority")
print(record["sentence"] if record else "not recorded yet: python -m chapters claim batch_priority --full")
assert record is None or record["numbers"]["perplexity, batch priority, C = 1"] > 1

# %% [markdown]
# So priority matters where room is short, as it may be when serving; with the room that mixtures are trained with, it
# does not.
#
# ## The price: it is not causal
#
# Whether a token is served depends on the others, and with priority on later ones too: on the rest of its own text,
# and on strangers' texts in the batch. V-MoE looks at whole images, where this is no matter. A decoder may train like
# that, but what it computes one token at a time differs from what it computed when it read the whole text.

# %%
tokens = lab.validation[:2].clone()
with torch.no_grad():
    set_policy(model, PriorityGate(2, 0.25, "before"))
    before = model(tokens)[0]
    tokens[1] = lab.validation[2]  # another neighbour
    changed = (model(tokens)[0] - before).abs().amax(1) > 1e-4
print(f"{changed.float().mean():.0%} of a sequence's outputs changed with its neighbour")
assert changed.any()

# %% [markdown]
# ## Two losses of its own
#
# V-MoE has no balance loss. It asks for equal importance (the sums of gates), and for equal load. Load is a count and
# has no gradient, so it takes the count that was to be expected: had the noise on one logit been drawn again, with what
# probability would this expert be among the k best? Equal sums do not make equal counts:

# %%
p = np.array([[0.6, 0.4], [0.6, 0.4], [0.3, 0.7]])
count = np.bincount(p.argmax(axis=1))
print(count, batch_priority.importance_loss(p), batch_priority.load_loss(np.log(p), np.log(p), 1, std=0.2))
assert batch_priority.importance_loss(p) < 1e-9 < batch_priority.load_loss(np.log(p), np.log(p), 1, std=0.2)

# %% [markdown]
# ## The kernel: no sort
#
# Sorting takes several launches. But the order itself is of no use: what is wanted is how many stand before a token,
# and that can be counted without sorting anything. Every program counts for 16 tokens, passing all the others. A tie
# goes to the token in front; outside the own block it is known beforehand who that is, so >= or > decides.

# %%
score = np.array([0.5, 0.9, 0.5, 0.5, 0.9])
ahead = [int((score[:t] >= s).sum() + (score[t + 1 :] > s).sum()) for t, s in enumerate(score)]
print(ahead)
assert np.argsort(ahead).tolist() == batch_priority.priority(score).tolist()

# %% [markdown]
# In bytes that is nothing: what it reads stays in the caches. Its operations grow as the square of the tokens, so it
# is for batches of some thousands; beyond, a sort is the better way. The lines are drawn for 15 T operations a second,
# what an H100's integer units do at best, and for 30 µs, about the ten launches of a sort and what follows it.

# %%
tokens = 2 ** np.arange(8, 15)
drawn, axes = figure(height=2.8)
for k, role in ((1, "second"), (2, "method"), (6, "accent")):
    axes.plot(tokens, tokens**2 * (1 + 3 * k + k * (k - 1)) / 15e6, **series(role), label=f"k = {k}")
axes.axhline(30, **series("reference") | {"marker": ""}, label="ten launches")
axes.set(xlabel="tokens", ylabel="µs at the least", xscale="log", yscale="log")
legend(axes)
drawn

# %% [markdown]
# The cases, with the bytes that have to move, and what the compiler makes of them, seen without a GPU (here for an H100
# or H200, sm_90):

# %%
for case in cases.cases("moe.batch_priority"):
    print(f"{case.name:55} {case.bytes / 1e3:6.0f} kB")
report = check.static_report("moe.batch_priority", [90])
print({(row["registers"], row["spill_bytes"]) for row in report}, "registers, bytes spilled")
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside a sort with one-hot matrices, and a sort with the routing kernel:

# %%
for row in bench.recorded("moe.batch_priority"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("moe.batch_priority"):
    print("not recorded yet: python -m kernels bench moe.batch_priority, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the order, the two losses, and the kernel's counting.
#
# ```
# python -m chapters exercise batch_priority --to my
# python -m pytest --submission my tests/moe/test_batch_priority.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.moe
# chapters.moe.__path__.insert(0, "../../my/chapters/moe")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["batch_priority"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["batch_priority"])) == 4
