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
# A small student cannot be its teacher. It will be wrong somewhere; the divergence decides where. Forward KL punishes
# it for missing what the teacher would say, reverse KL for saying what the teacher would not. This notebook looks at
# both, at the path between them and its two ends, where a well-known implementation jumps, and at the text to learn on.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.distillation import divergences
from chapters.figures import COLOURS, figure, legend, series
from chapters.lab import Lab
from chapters.shared import student_lab
from chapters.shared.memory import peak_bytes
from kernels import bench, check
from minitfm import evaluate

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
teacher = lab.model()

# %% [markdown]
# ## What hurts
#
# A student with half of the layers writes, and its teacher reads. The prompts are a person's, and so is the text that
# it learns from. But when it is used, one slip leads to the next: it then stands where no fixed text has been.

# %%
student = student_lab.from_teacher(teacher, layers=2)
given = lab.validation[:32]
own = divergences.gkd_batch(student, given, prompt=64, share=1.0, seed=0)
print(lab.tokenizer.decode(own[0, 64:].tolist())[:160])

# %% [markdown]
# How surprised is the teacher by a token of the person's text, and by one of the student's?

# %%
surprise = {name: evaluate.nll(teacher, text)[:, 63:].mean().item() for name, text in (("given", given), ("own", own))}
print({name: f"{nats:.1f} nats" for name, nats in surprise.items()})
assert surprise["own"] > surprise["given"]

# %% [markdown]
# ## The idea
#
# A teacher with two modes, and a student that has only one to give: a bump, whose place and width are free. Forward KL
# makes it cover both modes and everything between them, reverse KL makes it choose one.

# %%
x = np.linspace(-6, 6, 121)
modes = np.logaddexp(-((x + 2.5) ** 2) / 0.6, -((x - 2.5) ** 2) / 0.6 - 0.4)[None]
bumps = [(m, w) for m in np.linspace(-4, 4, 41) for w in np.linspace(0.4, 4, 31)]
students = np.concatenate([-((x[None] - m) ** 2) / (2 * w * w) for m, w in bumps])
best = {}
for beta in (1.0, 0.5, 0.0):
    losses = divergences.token_divergences(students, np.repeat(modes, len(bumps), axis=0), beta)[0]
    best[beta] = bumps[int(losses.argmin())]

# %% [markdown]
# The best bump by each of three divergences:

# %%
drawn, axes = figure(height=2.8)
axes.fill_between(x, np.exp(modes[0]) / np.exp(modes[0]).sum(), color=COLOURS["muted"], alpha=0.4, label="teacher")
for (beta, (m, w)), role in zip(best.items(), ("method", "second", "baseline"), strict=True):
    bump = np.exp(-((x - m) ** 2) / (2 * w * w))
    axes.plot(x, bump / bump.sum(), **(series(role) | {"marker": ""}), label=f"student, β = {beta:g}")
axes.set(xlabel="token, in a row", ylabel="probability")
legend(axes)
assert best[0.0][1] > 2 * best[1.0][1], "forward KL covers, reverse KL chooses"
drawn

# %% [markdown]
# ## Two ends, treated as limits
#
# Between the two lies the generalized Jensen-Shannon divergence, against the mixture m = β p + (1 − β) q. It vanishes
# as β or 1 − β does. Divided by β (1 − β) it goes to forward KL at 0 and to reverse KL at 1, and so `D_β` is one path
# from one to the other. TRL keeps the factor inside and takes KL at the ends: there it jumps.

# %%
s, t = 2 * np.random.default_rng(0).normal(size=(2, 1, 50))
betas = np.concatenate([[0], np.geomspace(1e-3, 0.5, 25), 1 - np.geomspace(0.5, 1e-3, 25)[1:], [1]])
path = {name: [divergences.token_divergences(s, t, b, 1.0, name)[0][0] for b in betas] for name in ("limits", "trl")}
drawn, axes = figure(height=2.8)
axes.plot(betas, path["limits"], **(series("method") | {"marker": ""}), label="D, with its limits")
axes.plot(betas[1:-1], path["trl"][1:-1], **(series("baseline") | {"marker": ""}), label="TRL, inside")
axes.plot([0, 1], [path["trl"][0], path["trl"][-1]], "s", color=COLOURS["baseline"], label="TRL, at the ends")
axes.set(xlabel="β", ylabel="nats", ylim=(0, None))
legend(axes)
drawn

# %% [markdown]
# The jump, in numbers. It matters to whoever sweeps β beside another loss, the text's: between 0 and 0.001 the weight
# of the teacher falls to less than a hundredth.

# %%
assert abs(path["limits"][1] / path["limits"][0] - 1) < 0.05
assert path["trl"][0] > 100 * path["trl"][1]

# %% [markdown]
# ## Near the ends, the formula fails before the mathematics does
#
# log(a / m) is then the difference of two logarithms that agree in nearly all of their digits, and is divided by the
# tiny β. `mixture_terms` never takes that difference. Below: how far the plain formula and the reference are off.

# %%
log_q, log_p = (v - np.logaddexp.reduce(v, axis=1, keepdims=True) for v in (s, t))
small = np.geomspace(1e-16, 1e-2, 29)
kl = divergences.mixture_terms(log_q, log_p, 0.0, 1.0)
plain = [np.exp(log_q) * (log_q - np.logaddexp(np.log1p(-b) + log_q, np.log(b) + log_p)) / b for b in small]
off = [np.abs(v - kl).max() for v in plain]
right = [np.abs(divergences.mixture_terms(log_q, log_p, b, 1 - b) - kl).max() for b in small]

# %% [markdown]
# The distance to the limit should shrink with β. By the plain formula it grows again:

# %%
drawn, axes = figure(height=2.6)
axes.plot(small, off, **(series("baseline") | {"marker": ""}), label="plain formula")
axes.plot(small, np.maximum(right, 1e-17), **(series("method") | {"marker": ""}), label="mixture_terms")
axes.set(xscale="log", yscale="log", xlabel="β", ylabel="away from the limit")
legend(axes)
assert off[0] > 1e3 * right[0]
drawn

# %% [markdown]
# ## In the model
#
# The same student, the same steps, the same prompts; by forward KL, by reverse KL, and by reverse KL on what it wrote
# itself. Left how unsure it becomes, right how far from its teacher it is on a text of its own.

# %%
claim = divergences.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Reverse KL makes it surer, and pays for that with perplexity, which is forward KL by another name. So short a training
# shows little of what a text of its own is worth: `python -m chapters claim divergences --full` trains longer, with
# three seeds, and also mixes both texts.

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
# tokens, and what the fused kernel needs besides its inputs: no probability is ever in memory.

# %%
a, b = torch.randn(2, 8, 128256)
plain = peak_bytes(lambda: divergences.token_loss(a.requires_grad_(), b).sum().backward())
fused = {"gradient of its own": a.nbytes, "in place": 0}  # and 16 bytes a token
drawn, axes = figure(height=2.2)
axes.barh(["plain operators", *fused], [size / a.nbytes for size in (plain, *fused.values())], color=COLOURS["method"])
axes.set(xlabel="tensors of the size of the logits, besides the logits")
assert plain > 4 * a.nbytes
drawn

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
