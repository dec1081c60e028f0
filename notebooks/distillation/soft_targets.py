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
from chapters.explore import explore
from chapters.figures import COLOURS, figure, legend, series
from chapters.lab import Lab
from chapters.shared import student_lab
from chapters.shared.memory import peak_bytes
from kernels import bench, cases, check, hardware

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
teacher = lab.model()

# %% [markdown]
# ## What hurts
#
# Half of the layers cost half of the time. Taking every other one out is easy. What do you expect of the rest, which
# was never trained to work without them? Perplexity is how many tokens the model wavers between, on average, if it
# found them equally likely; the teacher comes first.

# %%
student = student_lab.from_teacher(teacher, layers=2)
cut, whole = lab.perplexity(student), lab.base_perplexity
print(
    f"{student.num_parameters() / teacher.num_parameters():.0%} of the parameters, perplexity {whole:.0f} -> {cut:.0f}"
)
assert cut > 1.5 * whole

# %% [markdown]
# The rest is no model of its own. Something has to teach it.
#
# ## The idea
#
# "Return the absolute", and then? The text says: this one token. The teacher says of every token of its vocabulary how
# likely it is, and so also which ones would have done as well. Its probabilities are softmax(z / T) of its scores z,
# the logits; T is the temperature, 1 when it writes.

# %%
words = "Return the absolute"
ids = torch.tensor([[lab.tokenizer.begin, *lab.tokenizer.encode(words)]])
ranked = teacher(ids)[0, -1].detach().sort(descending=True)


def likeliest(T=1):
    held = (ranked.values / T).softmax(-1)
    drawn, axes = figure(height=2.8)
    axes.barh([repr(lab.tokenizer.decode([int(i)])) for i in ranked.indices[:9]], held[:9], color=COLOURS["method"])
    axes.invert_yaxis()
    axes.set(xlabel="probability", title=f"T = {T}: all other tokens together have {held[9:].sum():.0%}")
    return drawn


# %% [markdown]
# Its nine favourites. Live, raise the temperature. What happens to their order, and what to the tokens not shown?

# %%
explore(likeliest, T=[1, 2, 4, 8])

# %% [markdown]
# Here is the whole vocabulary, the likeliest token first, at three temperatures. The order never changes. At T = 1 a
# token of the first ranks counts a thousand times as much as one of the last thousand, so the loss is about the few
# likeliest. As T rises the line flattens, and more of the teacher's ranking enters. With too high a T all tokens count
# nearly alike, and what the teacher knows best is drowned by what it hardly knows.

# %%
drawn, axes = figure(height=2.8)
for T, role in ((1, "method"), (2, "baseline"), (4, "second")):
    held = (ranked.values / T).softmax(-1)
    axes.plot(np.arange(1, len(held) + 1), held, **(series(role) | {"marker": ""}), label=f"T = {T}")
axes.set(xscale="log", yscale="log", xlabel="rank of the token", ylabel="probability")
axes.set_title("temperature flattens, and keeps the order")
legend(axes)
drawn

# %% [markdown]
# As ranges: the higher T, the more is left for all but the first eight, and the less the first is ahead of the last.

# %%
held = [(ranked.values / T).softmax(-1) for T in (1, 2, 4)]
assert held[0][8:].sum() < held[1][8:].sum() < held[2][8:].sum()
assert held[0][0] / held[0][-1000] > 1000 > held[2][0] / held[2][-1000]

# %% [markdown]
# ## The loss, and why it has a T²
#
# Let p be the teacher's probabilities at temperature T and q the student's. Per token the loss is the divergence
# KL(p ‖ q) = Σ p log(p / q), summed over the vocabulary: 0 if they agree. Its gradient in the student's logits is
# (q − p) / T, and q − p itself shrinks about as 1 / T. So without a factor, raising T would turn the soft targets down
# against the hard ones, the tokens of the text, whose loss has no T. Times T² they weigh about the same.

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
axes.set(xscale="log", yscale="log", xlabel="temperature T", ylabel="size of gradient", title="T² keeps the balance")
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
# and the direction of the teacher's last hidden states (the triple loss). The claim gives the same student the same
# steps on the same tokens twice, once with a teacher and once with the text alone. A few dozen steps: how far will each
# get from where you saw it, towards the teacher?

# %%
claim = soft_targets.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Both have won back a good part of what the cut cost, and the taught student is ahead. It is also far from its teacher:
# DistilBERT trained for days, this one for seconds. One seed and one length of training do not show how large the lead
# is, nor that the teacher, who had to be run as well, was worth its time.
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
axes.set(xlabel="extra tensors of the size of the logits", title="the fused kernel keeps no softmax in memory")
assert plain > 4 * x.nbytes
drawn

# %% [markdown]
# Memory is also time. To compute the loss, both rows of logits have to be read once; for the gradient they are read
# again and it is written. With 4,096 tokens at a time, in bfloat16, an H200 needs at least

# %%
gpu = hardware.GPUS["H200"]
for case in cases.cases("distillation.soft_targets")[1:4:2]:
    floor = 1e6 * hardware.floor_seconds(case, gpu)
    print(f"{case.name:40} {case.bytes / 1e9:.1f} GB, {floor:4.0f} µs")
    assert hardware.floor_seconds(case, gpu) == case.bytes / gpu.bandwidth

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
assert len(workbook.choose(workbook.exercises(), ["soft_targets"])) == 5
