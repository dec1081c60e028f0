# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Task routing: a mixture that comes apart
#
# A mixture of experts sends each token to a few of several feed-forward layers, the experts. It uses few of its weights
# for a token, but the next token may need any others. So all of them stay in memory. If the task decides instead of the
# token, the experts of one task can be taken out, and what is left is a plain dense model, as small as it looks. This
# notebook trains such a mixture and takes it apart.

# %%
import numpy as np
import torch

from chapters import claims, workbook
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.moe import task_routing
from chapters.shared.text_kinds import KINDS, kind, sorted_text
from kernels import bench, cases, check
from minitfm.evaluate import mean_nll
from minitfm.generate import generate

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# A layer of Mixtral has eight experts of 3 × 14336 × 4096 numbers each, and a token visits two. How many of them does a
# text visit? If gates are even and independent, all but (1 - 2/8)^T of the experts after T tokens: after twenty tokens
# nearly every one. What a token saves in operations, a text does not save in memory.

# %%
tokens = np.arange(1, 41)
expert_bytes = 2 * 3 * 14336 * 4096
drawn, axes = figure(height=2.8)
held = {"tokens choose": 8 * (1 - 0.75**tokens), "the task chooses": np.full(40, 2)}
for (words, experts), role in zip(held.items(), ("baseline", "method"), strict=True):
    axes.plot(tokens, expert_bytes * experts / 1e9, **series(role), markevery=3, label=words)
axes.set(xlabel="tokens of the text", ylabel="GB of experts, one layer", ylim=(0, None), title="soon all are needed")
legend(axes, loc="center right")
drawn

# %% [markdown]
# ## The idea
#
# Give the router the task's number instead of the token. What it says of the experts, its logits, is then a small
# table, one row for a task, and `select` reads from it which k experts serve a task and how much each of them counts.
# Here are two tasks, four experts, and k = 2.

# %%
logits = np.array([[2.0, 0.0, 1.0, 0.0], [0.0, 3.0, 3.0, 1.0]])
expert, weight = map(np.stack, zip(*(task_routing.select(logits, task, 2) for task in range(2)), strict=True))
print(expert, weight.round(2), sep="\n")
assert expert.tolist() == [[0, 2], [1, 2]] and np.allclose(weight.sum(axis=1), 1)

# %% [markdown]
# The layer itself is that of any mixture: every row goes through the experts of its task, and what they answer is
# added up by weight. Rows of both tasks may stand in one batch.

# %%
rng = np.random.default_rng(0)
up, gate = rng.normal(size=(2, 4, 6, 5))
down = rng.normal(size=(4, 5, 6))
x = rng.normal(size=(3, 5))
mixed = task_routing.mixture(x, np.array([0, 1, 0]), expert, weight, up, down, gate)
print(mixed.round(1))

# %% [markdown]
# ## Side by side
#
# Two experts of width 6 are one layer of width 12: the rows of `up` below each other, the columns of `down` beside each
# other. The weight of an expert can go into its columns of `down`, behind the activation. (Why not into `up`? The
# activation lies in between and is not linear.) The result is not close to the mixture, it is the mixture.

# %%
wide_up, wide_down, wide_gate = task_routing.gather(up, down, expert[0], weight[0], gate)
assert wide_up.shape == (12, 5) and wide_down.shape == (5, 12)
np.testing.assert_allclose(task_routing.dense(x, wide_up, wide_down, wide_gate)[[0, 2]], mixed[[0, 2]])

# %% [markdown]
# Drawn, with a line where one expert ends and the other begins; the second expert counts less, so its columns of `down`
# are paler. `gate` is stacked like `up`.

# %%
drawn, (left, right) = panels(2, width=7.6, height=2.8, width_ratios=(1, 2))
heatmap(left, wide_up, "weight")
heatmap(right, wide_down, "weight")
left.axhline(5.5, color=COLOURS["reference"])
right.axvline(5.5, color=COLOURS["reference"])
left.set(title="up", xlabel="input", ylabel="hidden")
right.set(title="down, weighed", xlabel="hidden", ylabel="output")
drawn

# %% [markdown]
# What is not there is refused: a task or an expert that nobody has, more experts than there are.

# %%
for bad in (
    lambda: task_routing.select(logits, 2, 1),
    lambda: task_routing.select(logits, 0, 5),
    lambda: task_routing.gather(up, down, np.array([4]), np.ones(1), gate),
):
    try:
        bad()
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Tasks
#
# The book's corpus has no tasks written on it, but four kinds of paragraph, told apart by layout alone: prose, which
# is not indented; definitions, a line and its indented explanation; indented blocks; and examples with a prompt.

# %%
for paragraph in ("Some prose.", "f(x)\n    Explained.", "    a block", ">>> f(1)\n1"):
    print(f"{KINDS[kind(paragraph)]:12} {paragraph!r}")
text = lab.once("text by task", lambda: sorted_text(lab))
shares = (text.marked // lab.config.vocab_size).bincount() / len(text.marked)
assert shares[0] > 0.5 and len(shares) == len(KINDS)

# %% [markdown]
# Prose is most of it; the others are small, and the mixture is trained on them as rarely as they occur.

# %%
drawn, axes = figure(height=2.2)
axes.barh(KINDS, 100 * shares.numpy(), color=COLOURS["method"])
axes.set(xlabel="share of the training text (%)", title="the tasks are of unequal size")
axes.invert_yaxis()
drawn

# %% [markdown]
# ## A mixture, trained and taken apart
#
# Eight experts of half a dense layer's width, two for each task, half the base model's width, a few dozen steps from
# random weights: it has barely begun to learn, which is enough to see what `extract` does. Beside it a dense model of
# the size of one part learns from the same text for as long.

# %%
found = task_routing.compared(lab, task_routing.TaskMixture(len(KINDS)), 40, 0)
whole, parts = found.model.num_parameters(), [part.num_parameters() for part in found.parts]
print(f"mixture {whole:,} parameters; one task {parts[0]:,}")
print(f"largest difference of a logit, of the largest: {found.exact:.0e} in float64, {found.rounded:.0e} in float32")
assert max(parts) < 0.6 * whole and found.exact < 1e-10 and found.rounded < 1e-4

# %% [markdown]
# The same logits write the same text, drawn from the same seed. The part needs no task number any more, and nothing of
# this chapter: it is an ordinary model, which `run task_routing --to FOLDER` writes and
# `python -m minitfm generate --model FOLDER` runs.

# %%
prompt = torch.tensor([lab.tokenizer.encode("Return the")])
task_routing.set_task(found.model, 0)
ours, theirs = (generate(model, prompt, 12, temperature=0.8, seed=1) for model in (found.parts[0], found.model))
assert torch.equal(ours, theirs)
print(repr(lab.tokenizer.decode(ours[0].tolist())))

# %% [markdown]
# ## Who serves whom
#
# On the left the experts that each task took, and by how much: eight columns for each layer, two bright cells in each
# row of them. (Tasks 0 to 3 are prose, definitions, blocks and examples.) Where columns are shared, tasks share
# weights; nothing in the method forbids it. A balance loss works against all tasks taking the same. Where a column is
# empty nobody took the expert, and its weights were trained for nothing. On the right the quality on each task's text.

# %%
task_routing.draw(found, dict(zip(task_routing.MEASURED, found.perplexity, strict=True)))

# %% [markdown]
# ## Is a part any good elsewhere?
#
# Each part reads each kind of text: by how many percent is its perplexity higher than that of the part whose task it
# is? If experts have learned something of their task, the diagonal (0) is the least of its row. In so short a training
# this need not be so for every task.

# %%
ratio = np.array([[mean_nll(part, rows[:16]) for part in found.parts] for rows in text.measured])
ratio = np.exp(ratio - ratio.diagonal()[:, None])
drawn, axes = figure(height=2.6)
heatmap(axes, 100 * (ratio - 1), "% above own part", digits=0)
axes.set(xlabel="part of", ylabel="text of")
axes.set_xticks(range(len(KINDS)), KINDS)
axes.set_yticks(range(len(KINDS)), KINDS)
assert ratio.mean() > 1
drawn

# %% [markdown]
# And beside a dense model? That comparison is the honest one for quality: the part costs as much to run as the dense
# model, and more to train. Which will be better?

# %%
for name, mean in zip(task_routing.MEASURED, np.exp(np.log(found.perplexity).mean(axis=1)), strict=True):
    print(f"{name:20} perplexity {mean:.0f}")
assert (found.perplexity < lab.config.vocab_size).all()

# %% [markdown]
# The recorded claim trains longer, from three seeds:

# %%
record = claims.recorded("task_routing")
print(record["sentence"] if record else "not recorded yet: python -m chapters claim task_routing --full")
assert record is None or record["numbers"]["parameters, one task"] < record["numbers"]["parameters, mixture"]

# %% [markdown]
# The part has the mixture's logits, and knows its task: with another task's experts the text is read worse. But the
# dense model, which learns from all texts, is better still. Four kinds of paragraphs of one book have much in common,
# and the rare ones are too small to learn from alone. The paper's tasks are
# pairs of languages to translate between, which differ more.
#
# ## The kernel, in bytes
#
# Taking out is copying, so the floor is simple: the chosen experts in, the dense layer out, nothing of the others. In
# plain torch each matrix is a launch, and `down` is selected, converted, multiplied, converted back and moved again.

# %%
case = cases.cases("moe.task_routing")[0]
one = 2 * 14336 * 4096  # numbers of a matrix of the two experts
naive = 2 * (2 * 2 * one) + (2 + 2 + 2 + 4 + 4 + 4 + 4 + 2 + 2 + 2) * one
print(f"{case.name}: {case.bytes / 1e9:.1f} GB; by index_select, float, product and cat {naive / 1e9:.1f} GB")
assert naive > 2 * case.bytes

# %% [markdown]
# The rows of up and gate are one run of memory for each expert. Only `down` needs care: a row of the result consists
# of k pieces, one of each expert, so a tile of it stops where the neighbour's columns begin. What the compiler makes of
# it, seen without a GPU (here for an H100 or H200, sm_90):

# %%
report = check.static_report("moe.task_routing", [90])
for row in report:
    print(f"{row['case']:36} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside plain torch:

# %%
for row in bench.recorded("moe.task_routing"):
    peers = ", ".join(f"{name} {peer:.1f} µs" for name, peer in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("moe.task_routing"):
    print("not recorded yet: python -m kernels bench moe.task_routing, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the choice, the mixture, the dense layer made of experts, and the kernel.
#
# ```
# python -m chapters exercise task_routing --to my
# python -m pytest --submission my tests/moe/test_task_routing.py
# ```
#
# To run this notebook with your own functions, put these two lines into a new first cell, and restart it:
#
# ```
# import chapters.moe
# chapters.moe.__path__.insert(0, "../../my/chapters/moe")
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["task_routing"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["task_routing"])) == 4
