# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Linformer: a few slots instead of all tokens, and why it cannot write
#
# T queries times S keys make T × S attention weights. Linformer mixes the keys, and the values, into a few slots before
# any query comes, by a matrix that is the same for every text. This notebook asks three questions of a real model: are
# its attention matrices simple enough for that, does one mixture fit all texts, and who gets to see the future?

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import linformer
from chapters.explore import explore
from chapters.figures import figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.shared.projected_attention import BlockwiseAttention, SlotAttention, influence, layer_inputs
from kernels import bench, cases, check, hardware
from minitfm.model import causal_attention

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
D = lab.config.head_dim

# %% [markdown]
# ## What hurts
#
# Operations of one head over a text of T tokens: full attention squares the length, attention to slots does not.

# %%
lengths = [2**n for n in range(6, 15)]
drawn, axes = figure(width=5, height=2.4)
axes.plot(lengths, [linformer.softmax_operations(n, n, D) for n in lengths], **series("baseline"), label="all tokens")
for slots, role in ((64, "second"), (256, "method")):
    operations = [linformer.linformer_operations(n, n, D, slots) for n in lengths]
    axes.plot(lengths, operations, **series(role), label=f"{slots} slots")
axes.loglog()
axes.set(xlabel="tokens", ylabel="operations per head")
legend(axes)
drawn

# %% [markdown]
# They cross where the text is twice as long as there are slots, since keys are projected first and attended to later:

# %%
assert linformer.crossover(256) == 2 * 256 + 1

# %% [markdown]
# ## The idea
#
# A slot is a weighted sum over all positions. With as many slots as tokens and E = I nothing changes; with fewer, the
# softmax has fewer entries.

# %%
generator = np.random.default_rng(0)
q, k, v = generator.normal(size=(3, 1, 1, 12, 8))
e = linformer.segment_means(4, 12)
slots = linformer.project(k, e)
np.testing.assert_allclose(slots[0, 0, 1], k[0, 0, 3:6].mean(axis=0))
same = linformer.linformer_attention(q, k, v, np.eye(12))
np.testing.assert_allclose(same, linformer.attend_slots(q, k, v))
print(f"keys {k.shape}, slots {slots.shape}, out {linformer.linformer_attention(q, k, v, e).shape}")

# %% [markdown]
# ## Are the matrices simple?
#
# If most of a matrix lies in few singular values, few slots could hold what it says. Here is that share for the real
# model, layer by layer, with nothing hidden, as Linformer reads a text. Shuffled rows are the control: the same weights
# in no order.

# %%
layers = layer_inputs(lab, lab.validation[:2])
weights = [(q @ k.mT / D**0.5).double().softmax(-1).numpy() for q, k, _ in layers]
shuffled = generator.permuted(np.stack(weights), axis=-1)
quarter = lab.length // 4
ours = [linformer.rank_share(w, quarter).mean() for w in weights]
control = [linformer.rank_share(w, quarter).mean() for w in shuffled]
assert np.mean(ours) > np.mean(control)

# %% [markdown]
# The first quarter of the singular values, in each layer:

# %%
drawn, axes = figure(width=5, height=2.4)
places = np.arange(len(ours))
axes.plot(places, ours, **series("method"), label="attention")
axes.plot(places, control, **series("muted"), label="shuffled")
axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.02), xticks=places)
legend(axes)
drawn

# %% [markdown]
# ## Does one projection fit all texts?
#
# A low rank is a property of one matrix. E is one matrix for all texts, and knows positions only, no contents. The
# claim measures what it costs: outputs of full attention against outputs from slots, on texts that were not fitted.
# "Best of that rank" looks at each matrix and picks its own singular vectors: what low rank alone would allow.

# %%
claim = linformer.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Training E and F alone beats chance by far, and the plain means of runs hardly: the gap to the best rank stays.
# Linformer's authors train the whole model around its projections, for long; a model that was trained without them does
# not get them for free.

# %%
found = {name.split(", ")[-1]: x for name, x in claim.numbers.items() if f"{quarter} slots" in name}
assert found["best of that rank"] < found["trained"] < found["drawn at random"]

# %% [markdown]
# ## Who sees the future?
#
# Replace key and value j, and see which outputs i change. Above the diagonal lies what a causal model must not show.

# %%
rows = [x[:1, :1, :24] for x in layers[1]]
later = torch.ones(24, 24, dtype=torch.bool).triu(1)
with torch.no_grad():
    assert (influence(causal_attention, *rows)[later] == 0).all()
    assert (influence(BlockwiseAttention(*linformer.as_tensors(2, 8)), *rows)[later] == 0).all()
    assert (influence(SlotAttention(*linformer.as_tensors(6, 24)), *rows)[later] > 0).all()

# %% [markdown]
# Linformer's slots hold every position, so everything changes; slots of finished blocks keep the triangle.


# %%
def who_changes(block=8):
    """Linformer and its blockwise form, side by side."""
    drawn, axes = panels(2, height=2.5)
    modules = {"Linformer": SlotAttention(*linformer.as_tensors(6, 24))}
    modules["blockwise"] = BlockwiseAttention(*linformer.as_tensors(2, block))
    for panel, (title, module) in zip(axes, modules.items(), strict=True):
        heatmap(panel, (influence(module, *rows) > 0).float().numpy(), "changes")
        panel.set(xlabel="token replaced", ylabel="output", title=title)
    return drawn


# %% [markdown]
# In a live notebook, choose the length of a block:

# %%
explore(who_changes, block=[4, 8, 12])

# %% [markdown]
# A mask over the slots does not help. Even if the first query may read the first slot only, that slot is a sum over all
# tokens, the last one included:

# %%
drawn_e = torch.from_numpy(linformer.gaussian(6, 24)).float()
first_slot = drawn_e[:1] @ rows[2][0, 0]
changed = rows[2][0, 0].clone()
changed[-1] += 1
assert not torch.allclose(drawn_e[:1] @ changed, first_slot)

# %% [markdown]
# What that does to a language model: trained for the next token, it learns to read it from the slots. Its loss looks
# better than the honest model's, and is worth nothing, because when it writes, the next token is not there.

# %%
perplexity = {name.removeprefix("perplexity, "): x for name, x in claim.numbers.items() if "perplexity" in name}
print({name: round(x, 1) for name, x in perplexity.items()})
assert perplexity["Linformer"] < perplexity["base"] < perplexity["Linformer, later tokens absent"]
assert perplexity["base"] < perplexity["blockwise"] < perplexity["Linformer, later tokens absent"]

# %% [markdown]
# ## The kernel
#
# No query may start before the last token has been added to every slot, so there are two launches: one adds up the
# slots, one lets tiles of queries pass the slots, which stay on chip.

# %%
case = cases.cases("attention.linformer")[0]
gpu = hardware.GPUS["H200"]
print(f"{case.name}: {case.bytes / 1e6:.0f} MB, {case.operations / 1e9:.1f} GFLOP; floor "
      f"{1e6 * hardware.floor_seconds(case, gpu):.0f} µs on an H200")  # fmt: skip
written_and_read = 4 * 2 * 32 * 4096 * 128  # bytes of scores and weights that operators would move
print(f"operators one by one move {written_and_read / 1e6:.0f} MB more")
assert written_and_read > case.bytes / 2

# %% [markdown]
# What the compiler makes of it for an H100 or H200 (sm_90):

# %%
report = check.static_report("attention.linformer", [90])
for row in report:
    print(f"{row['case'][:44]:44} {row['kernel']:15} {row['registers']:3} registers, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the same in torch:

# %%
for row in bench.recorded("attention.linformer"):
    peers = ", ".join(f"{peer} {time:.0f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.0f} µs; {peers}")
if not bench.recorded("attention.linformer"):
    print("not recorded yet: python -m kernels bench attention.linformer, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# ```
# python -m chapters exercise linformer --to my
# python -m pytest --submission my tests/attention/test_linformer.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["linformer"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["linformer"])) == 5
