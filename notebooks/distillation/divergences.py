# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Divergences: cover everything, or commit to something
#
# A small student cannot be its teacher. It will be wrong somewhere; the loss that it is trained by, a divergence of two
# distributions, decides where. With the teacher's probabilities p and the student's q, forward KL, Σ p log(p / q),
# punishes it for missing what the teacher would say; reverse KL, Σ q log(q / p), for saying what the teacher would not.
# This notebook looks at both, at the path between them and its two ends, where a well-known implementation jumps, and
# at the text to learn on.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.distillation import divergences
from chapters.explore import explore
from chapters.figures import COLOURS, figure, legend, panels, series
from chapters.lab import Lab
from chapters.shared import student_lab
from chapters.shared.memory import peak_bytes
from kernels import bench, cases, check, hardware
from minitfm import evaluate

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
teacher = lab.model()

# %% [markdown]
# ## What hurts
#
# A student with half of the teacher's layers, not yet trained, writes, and its teacher reads. The prompts are a
# person's, and so is the text that students are usually trained on. But when a student is used, one slip leads to the
# next: it then stands where no fixed text has been. `gkd_batch`, of generalized knowledge distillation, mixes texts to
# learn from; here the student writes all of them, after a prompt of 64 tokens.

# %%
student = student_lab.from_teacher(teacher, layers=2)
given = lab.validation[:32]
own = divergences.gkd_batch(student, given, prompt=64, share=1.0, seed=0)
print(lab.tokenizer.decode(own[0, 64:].tolist())[:160])

# %% [markdown]
# How surprised is the teacher by a token of the person's text, and by one of the student's? Surprise is −log p, in
# nats: 0 for what is certain, one more for each factor of 2.7 that a token is less likely. Guess first.

# %%
surprise = {name: evaluate.nll(teacher, text)[:, 63:].mean().item() for name, text in (("given", given), ("own", own))}
print({name: f"{nats:.1f} nats" for name, nats in surprise.items()})
assert surprise["own"] > surprise["given"]

# %% [markdown]
# ## The idea
#
# A teacher with two modes, and a student that has only one to give: a bump, whose place and width are free. `search`
# tries 41 places and 31 widths and returns the loss of each, and the best. Its loss, D_β, is forward KL at β = 0 and
# reverse KL at β = 1. What will either make of the two modes?

# %%
x, places, widths = np.linspace(-6, 6, 121), np.linspace(-4, 4, 41), np.linspace(0.4, 4, 31)
modes = np.logaddexp(-((x + 2.5) ** 2) / 0.6, -((x - 2.5) ** 2) / 0.6 - 0.4)
bumps = [(m, w) for m in places for w in widths]
students = np.stack([-((x - m) ** 2) / (2 * w * w) for m, w in bumps])


def search(beta):
    losses = divergences.token_divergences(students, np.tile(modes, (len(bumps), 1)), beta)[0]
    return losses.reshape(41, 31), bumps[int(losses.argmin())]


# %% [markdown]
# Forward KL makes the student cover both modes and everything between them, where the teacher says nothing; reverse KL
# makes it choose one mode, and forget the other.


# %%
def bell(m, w):
    return np.exp(-((x - m) ** 2) / (2 * w * w)) / np.exp(-((x - m) ** 2) / (2 * w * w)).sum()


drawn, axes = figure(height=2.8)
axes.fill_between(x, np.exp(modes) / np.exp(modes).sum(), color=COLOURS["muted"], alpha=0.4, label="teacher")
for beta, role, name in ((0.0, "baseline", "forward KL"), (1.0, "method", "reverse KL")):
    axes.plot(x, bell(*search(beta)[1]), **(series(role) | {"marker": ""}), label=f"student by {name}")
axes.set(xlabel="token, in a row", ylabel="probability", title="cover everything, or commit to something")
legend(axes)
drawn

# %% [markdown]
# And in between? On the left the loss of every bump, the darker the better; the star is the best. There are two
# valleys, a wide bump in the middle and a narrow one on the larger mode (and a third, on the smaller mode, that never
# wins). At the β below they are nearly as deep. Live, move β: the student does not change gradually. Where does it
# jump?


# %%
def valleys(beta=0.25):
    loss, best = search(beta)
    drawn, (left, right) = panels(2, width=8.0, height=2.8)
    left.contourf(places, widths, loss.T, levels=np.geomspace(loss.min(), loss.max(), 16), cmap="cividis")
    left.plot(*best, "*", color="white", markeredgecolor="black", markersize=15)
    left.set(xlabel="place of the bump", ylabel="width of the bump", title=f"β = {beta:g}: loss, dark is low")
    right.fill_between(x, np.exp(modes) / np.exp(modes).sum(), color=COLOURS["muted"], alpha=0.4)
    right.plot(x, bell(*best), **(series("method") | {"marker": ""}))
    right.set(xlabel="token, in a row", ylabel="probability", title="the best student")
    return drawn


# %% [markdown]
# The teacher is grey, the student the line.

# %%
assert search(0.0)[1][1] > 2 * search(1.0)[1][1], "forward KL covers, reverse KL chooses"
explore(valleys, beta=[0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1])

# %% [markdown]
# ## Two ends, treated as limits
#
# What is D_β? Between forward and reverse KL lies the generalized Jensen-Shannon divergence, β KL(p ‖ m) + (1 − β) KL(q
# ‖ m), with the mixture m = β p + (1 − β) q. It vanishes as β or 1 − β does. Divided by β (1 − β) it goes to forward KL
# at 0 and to reverse KL at 1, and so D_β is one path from one to the other. TRL, a library that many train with, does
# not divide, and takes KL at the ends. What happens there?

# %%
s, t = 2 * np.random.default_rng(0).normal(size=(2, 1, 50))
betas = np.concatenate([[0], np.geomspace(1e-3, 0.5, 25), 1 - np.geomspace(0.5, 1e-3, 25)[1:], [1]])
path = {name: [divergences.token_divergences(s, t, b, 1.0, name)[0][0] for b in betas] for name in ("limits", "trl")}
drawn, axes = figure(height=2.8)
axes.plot(betas, path["limits"], **(series("method") | {"marker": ""}), label="D, with its limits")
axes.plot(betas[1:-1], path["trl"][1:-1], **(series("baseline") | {"marker": ""}), label="TRL, inside")
axes.plot([0, 1], [path["trl"][0], path["trl"][-1]], "s", color=COLOURS["baseline"], label="TRL, at the ends")
axes.set(xlabel="β", ylabel="loss, nats", ylim=(0, None), title="one path, or a jump at either end")
legend(axes)
drawn

# %% [markdown]
# The dash-dotted line goes to 0, and the squares at its ends are far above. The jump matters to whoever sweeps β beside
# another loss, the text's: between 0 and 0.001 the weight of the teacher falls to less than a hundredth.

# %%
assert abs(path["limits"][1] / path["limits"][0] - 1) < 0.05
assert path["trl"][0] > 100 * path["trl"][1]

# %% [markdown]
# ## Near the ends, the formula fails before the mathematics does
#
# For tiny β the mixture m is nearly q. log(q / m) is then the difference of two logarithms that agree in nearly all of
# their digits, and is divided by that β: rounding errors grow with 1 / β. `mixture_terms` never takes the difference.
# Below: how far the plain formula and the reference are from the limit at β = 0.

# %%
log_q, log_p = (v - np.logaddexp.reduce(v, axis=1, keepdims=True) for v in (s, t))
small = np.geomspace(1e-16, 1e-2, 29)
kl = divergences.mixture_terms(log_q, log_p, 0.0, 1.0)
plain = [np.exp(log_q) * (log_q - np.logaddexp(np.log1p(-b) + log_q, np.log(b) + log_p)) / b for b in small]
off = [np.abs(v - kl).max() for v in plain]
right = [np.abs(divergences.mixture_terms(log_q, log_p, b, 1 - b) - kl).max() for b in small]

# %% [markdown]
# The distance to the limit should shrink with β, from right to left. By the plain formula it grows again:

# %%
drawn, axes = figure(height=2.6)
axes.plot(small, off, **(series("baseline") | {"marker": ""}), label="plain formula")
axes.plot(small, np.maximum(right, 1e-17), **(series("method") | {"marker": ""}), label="mixture_terms")
axes.set(xscale="log", yscale="log", xlabel="β", ylabel="distance from limit", title="rounding takes over")
legend(axes)
assert off[0] > 1e3 * right[0]
drawn

# %% [markdown]
# ## In the model
#
# The same student, the same steps, the same prompts; by forward KL, by reverse KL, and by reverse KL on what it wrote
# itself. Left its entropy, which says how unsure it becomes; right how far from its teacher it is on a text of its own.
# From the two bumps above: which of the divergences will leave the surer student, and which the better perplexity?

# %%
claim = divergences.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Reverse KL makes it surer, and pays for that with perplexity, which is forward KL by another name: it, too, punishes
# what the student misses. The differences are small, and so short a training shows little of what a text of its own is
# worth: `python -m chapters claim divergences --full` trains longer, with three seeds, and also mixes both texts.

# %%
numbers = claim.numbers
assert numbers["entropy, reverse KL"] < numbers["entropy, forward KL"]
assert numbers["perplexity, forward KL"] < numbers["perplexity, reverse KL"]

# %% [markdown]
# Train a student of your own, stop it when you like, go on with the same command, and let it write:
#
# ```
# python -m chapters run divergences --beta 1 --share 0.5 --steps 1000 --sequences 4096 --state run.pt --save student
# python -m minitfm generate --model student "Return the"
# ```
#
# ## The kernel, in bytes
#
# One token of a large vocabulary has 128,256 logits, twice. Below, what the plain operators hold at once for 8 such
# tokens, and what the fused kernel needs besides its inputs.

# %%
a, b = torch.randn(2, 8, 128256)
plain = peak_bytes(lambda: divergences.token_loss(a.requires_grad_(), b).sum().backward())
fused = {"gradient of its own": a.nbytes, "in place": 0}  # and 16 bytes a token
drawn, axes = figure(height=2.2)
axes.barh(["plain operators", *fused], [size / a.nbytes for size in (plain, *fused.values())], color=COLOURS["method"])
axes.set(xlabel="extra tensors of the size of the logits", title="no probability is ever in memory")
assert plain > 4 * a.nbytes
drawn

# %% [markdown]
# At least both rows of logits must be read once, and for the gradient be read again while it is written. With 4,096
# tokens at a time, in bfloat16, an H200 needs for that at least:

# %%
gpu = hardware.GPUS["H200"]
for case in cases.cases("distillation.divergences")[1:4:2]:
    floor = 1e6 * hardware.floor_seconds(case, gpu)
    print(f"{case.name:42} {case.bytes / 1e9:.1f} GB, {floor:4.0f} µs")
    assert hardware.floor_seconds(case, gpu) == case.bytes / gpu.bandwidth

# %% [markdown]
# The mixture needs probabilities that are normed, so the kernel reads a row twice, the second time from its end: what
# was read last is still in the cache. A cache that holds a part of a row, and drops what it has not used for longest,
# shows what the direction is worth:

# %%
blocks, room = list(range(16)), 10
for name, second in (("from the start", blocks), ("from the end", blocks[::-1])):
    cache, missed = blocks[-room:], 0
    for block in second:
        missed += block not in cache
        cache = [*[held for held in cache if held != block][1 - room :], block]
    print(f"{name}: {missed} of 16 blocks come from memory again")
assert missed == len(blocks) - room

# %% [markdown]
# A block as wide as the row would not fit the registers. What the compiler makes of narrow ones:

# %%
report = check.static_report("distillation.divergences", [90])
for row in report:
    print(f"{row['case']:40} {row['kernel']:18} {row['registers']:3} registers, {row['spill_bytes']} bytes spilled")
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the plain operators:

# %%
for row in bench.recorded("distillation.divergences"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("distillation.divergences"):
    print("not recorded yet: python -m kernels bench distillation.divergences, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Four functions are left to you: the terms with their limits, the batch that GKD learns from, and both kernels.
#
# ```
# python -m chapters exercise divergences --to my
# python -m pytest --submission my tests/distillation/test_divergences.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["divergences"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["divergences"])) == 4
