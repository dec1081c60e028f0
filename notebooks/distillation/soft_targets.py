# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Soft targets: what a teacher knows beyond the right answer
#
# A text says which token came next, and nothing about the thousands that did not. A trained model says of every token
# how likely it was. A smaller model, the student, can learn from that. This notebook looks at what is in those
# probabilities, at the one parameter that brings it out, and at a student that starts as half of its teacher.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.distillation import soft_targets
from chapters.figures import COLOURS, figure, legend, series
from chapters.lab import Lab
from chapters.shared import student_lab
from chapters.shared.memory import peak_bytes
from kernels import bench, check

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
teacher = lab.model()

# %% [markdown]
# ## What hurts
#
# Half of the layers cost half of the time. Taking them out is easy, and breaks the model: every other layer of the
# teacher is no model of its own. Something has to teach it.

# %%
student = student_lab.from_teacher(teacher, layers=2)
cut, whole = lab.perplexity(student), lab.base_perplexity
print(
    f"{student.num_parameters() / teacher.num_parameters():.0%} of the parameters, perplexity {whole:.0f} -> {cut:.0f}"
)
assert cut > 1.5 * whole

# %% [markdown]
# ## The idea
#
# Here is how likely the teacher finds each token of its vocabulary after a few words, the likeliest first, at three
# temperatures. The order never changes. But at T = 1 the loss sees little beyond the first few; as T rises the line
# flattens, and what is possible stands apart from what is not: that is what the text alone does not say.

# %%
words = "Return the absolute"
ids = torch.tensor([[lab.tokenizer.begin, *lab.tokenizer.encode(words)]])
ranked = teacher(ids)[0, -1].detach().sort(descending=True)
drawn, axes = figure(height=2.8)
for T, role in ((1, "method"), (2, "baseline"), (4, "second")):
    held = (ranked.values / T).softmax(-1)
    axes.plot(np.arange(1, len(held) + 1), held, **(series(role) | {"marker": ""}), label=f"T = {T}")
axes.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="probability")
legend(axes)
drawn

# %% [markdown]
# The first of them, by name, and what the others hold together:

# %%
print(words, "|", [lab.tokenizer.decode([int(i)]) for i in ranked.indices[:8]])
others = [float((ranked.values / T).softmax(-1)[8:].sum()) for T in (1, 2, 4)]
print("all but these eight:", ", ".join(f"{share:.0%}" for share in others))
assert others[0] < others[1] < others[2], "the higher T, the more is left for the others"

# %% [markdown]
# ## The loss, and why it has a T²
#
# Per token the loss is KL(p ‖ q) between both distributions at temperature T, summed over the vocabulary. Its gradient
# in the student's logits is (q − p) / T, and q − p itself shrinks about as 1 / T. So without a factor, raising T would
# turn the soft targets down against the hard ones. Times T² they weigh about the same.

# %%
rng = np.random.default_rng(0)
s, t = rng.normal(size=(2, 64, 500))
targets, temperatures, sizes = np.zeros(64, int), np.array([1.0, 2, 4, 8, 16]), []
for T in temperatures:
    norms = soft_targets.token_losses(s, t, targets, T)[2]
    gradient = soft_targets.token_gradient(s, t, targets, norms, np.ones(64), np.zeros(64), T)
    sizes.append(np.abs(gradient).sum(axis=1).mean())
assert max(sizes) < 2.5 * min(sizes)
assert sizes[0] > 50 * sizes[-1] / temperatures[-1] ** 2

# %% [markdown]
# With the factor it stays, without it a high T silences the teacher:

# %%
drawn, axes = figure(height=2.6)
axes.plot(temperatures, sizes, **series("method"), label="with T²")
axes.plot(temperatures, sizes / temperatures**2, **series("baseline"), label="without")
axes.set(xscale="log", yscale="log", xlabel="temperature", ylabel="size of the gradient")
axes.set_xticks(temperatures, [f"{T:.0f}" for T in temperatures])
axes.minorticks_off()
legend(axes)
drawn

# %% [markdown]
# A trap: `nn.KLDivLoss()` averages over the vocabulary, too, unless it is told "batchmean". With 32,000 tokens the soft
# targets then weigh 32,000 times too little, and nobody is told. Here, 500 times:

# %%
log_q, log_p = (torch.from_numpy(x / 2).log_softmax(-1) for x in (s, t))
careless = torch.nn.KLDivLoss(log_target=True)(log_q, log_p).item() * 2**2
right = soft_targets.token_losses(s, t, targets, temperature=2.0)[0].mean()
assert np.isclose(right / careless, 500)

# %% [markdown]
# ## In the model
#
# DistilBERT's student starts as every other layer of its teacher and learns from three things: soft targets, the text,
# and the direction of the teacher's last hidden states. The claim gives the same student the same steps on the same
# tokens twice, once with a teacher and once without.

# %%
claim = soft_targets.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# The taught student is ahead. It is also far from its teacher: DistilBERT trained for days, this one for seconds.
# `python -m chapters claim soft_targets --full` trains longer, with three seeds, and also gives the student without a
# teacher the operations that the teacher's forward passes cost.

# %%
assert claim.holds
assert claim.numbers["perplexity, teacher"] < claim.numbers["perplexity, triple loss"] < cut

# %% [markdown]
# Train a student of your own, stop it when you like, go on with the same command, and let it write:
#
# ```
# python -m chapters run soft_targets --layers 2 --steps 2000 --sequences 4096 --state run.pt --save student
# python -m minitfm generate --model student "Return the"
# ```
#
# ## The kernel, in bytes
#
# One token of a large vocabulary has 128,256 logits, twice. In separate operators every softmax is a tensor of its own:
# below, what the plain operators hold at once for 16 such tokens, and what the fused kernel needs besides its inputs.

# %%
x = torch.randn(16, 128256)
y, at = torch.randn(16, 128256), torch.zeros(16, dtype=torch.int64)
plain = peak_bytes(lambda: soft_targets.soft_and_hard(x.requires_grad_(), y, at)[0].sum().backward())
fused = {"gradient of its own": x.nbytes, "in place": 0}  # and 20 bytes a token
drawn, axes = figure(height=2.2)
axes.barh(["plain operators", *fused], [size / x.nbytes for size in (plain, *fused.values())], color=COLOURS["method"])
axes.set(xlabel="tensors of the size of the logits, besides the logits")
assert plain > 4 * x.nbytes
drawn

# %% [markdown]
# The kernel reads a row in blocks and keeps a running maximum of either model; when one grows, the sums so far are
# rescaled. A row that arrives in blocks must cost what it costs at once, however the maxima move:


# %%
def in_blocks(s, t, size):
    s_top, t_top, q, p, cross = s[0], t[0], 0.0, 0.0, 0.0
    for start in range(0, len(s), size):
        a, b = s[start : start + size], t[start : start + size]
        s_step, t_step = min(0, s_top - a.max()), min(0, t_top - b.max())
        s_top, t_top = s_top - s_step, t_top - t_step
        cross = np.exp(t_step) * (cross + p * (t_step - s_step)) + (np.exp(b - t_top) * (b - t_top - a + s_top)).sum()
        q, p = q * np.exp(s_step) + np.exp(a - s_top).sum(), p * np.exp(t_step) + np.exp(b - t_top).sum()
    return cross / p - np.log(p) + np.log(q)


# %% [markdown]
# Logits that rise in one model and fall in the other move both maxima all the time:

# %%
ramp = np.linspace(-30, 30, 500)
expected = soft_targets.token_losses((s + ramp)[:1], (t - ramp)[:1], targets[:1], temperature=1.0)[0][0]
assert all(np.isclose(in_blocks(s[0] + ramp, t[0] - ramp, size), expected) for size in (1, 7, 64, 500))

# %% [markdown]
# A block as wide as the row does not fit the registers, and what does not fit is written to memory: a spill. What the
# compiler makes of blocks of 2,048:

# %%
report = check.static_report("distillation.soft_targets", [90])
for row in report:
    print(f"{row['case']:40} {row['kernel']:16} {row['registers']:3} registers, {row['spill_bytes']} bytes spilled")
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the plain operators:

# %%
for row in bench.recorded("distillation.soft_targets"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("distillation.soft_targets"):
    print("not recorded yet: python -m kernels bench distillation.soft_targets, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# Five functions are left to you: what a token costs, its gradient, the cosine of hidden states, and both kernels.
#
# ```
# python -m chapters exercise soft_targets --to my
# python -m pytest --submission my tests/distillation/test_soft_targets.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["soft_targets"]):
    print(f"{exercise.points} points  {exercise.function}")
