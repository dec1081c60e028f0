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
# T queries times S keys make T × S attention weights: twice the text, four times the work. Linformer mixes the keys,
# and the values, into a few slots before any query comes, by a matrix that is the same for every text. This notebook
# asks three questions of a real model: are its attention matrices simple enough for that, does one mixture fit all
# texts, and who gets to see the future?

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
# Operations of one head of our model over a text: full attention squares the length, attention to slots does not. Where
# do the lines cross?

# %%
lengths = [2**n for n in range(6, 15)]
drawn, axes = figure(height=2.6)
axes.plot(lengths, [linformer.softmax_operations(n, n, D) for n in lengths], **series("baseline"), label="all tokens")
for slots, role in ((64, "second"), (256, "method")):
    operations = [linformer.linformer_operations(n, n, D, slots) for n in lengths]
    axes.plot(lengths, operations, **series(role), label=f"{slots} slots")
axes.loglog()
axes.set(xlabel="tokens", ylabel="operations per head", title="slots pay from twice their number of tokens on")
legend(axes)
drawn

# %% [markdown]
# They cross where the text is twice as long as there are slots, because two kinds of products are left: keys and values
# are mixed into slots, and queries attend to these.

# %%
assert linformer.crossover(256) == 2 * 256 + 1

# %% [markdown]
# ## The idea
#
# Let K and V be the keys and values of a head, a row for each of S tokens. Linformer has two matrices E and F with a
# row for each slot and a column for each position, and attends to E K and F V in place of K and V:
#
#     out = softmax(q (E K)ᵀ / √D) (F V)
#
# A slot is a weighted sum over all positions. With as many slots as tokens and E = F = I nothing changes; with fewer,
# the softmax has fewer entries. The simplest E takes the means of runs, below 12 tokens in 4 slots:

# %%
generator = np.random.default_rng(0)
q, k, v = generator.normal(size=(3, 1, 1, 12, 8))
e = linformer.segment_means(4, 12)
np.testing.assert_allclose(linformer.project(k, e)[0, 0, 1], k[0, 0, 3:6].mean(axis=0))
same = linformer.linformer_attention(q, k, v, np.eye(12))
np.testing.assert_allclose(same, linformer.attend_slots(q, k, v))
drawn, axes = figure(width=5.0, height=2.0)
heatmap(axes, e, "weight")
axes.set(xlabel="position", ylabel="slot", title="E, if slots are means of runs")
drawn

# %% [markdown]
# And this is what becomes of the real model's weights, in one head of the last layer, for 128 tokens and 32 slots. All
# tokens are seen here, the later ones, too, because that is how Linformer reads a text.

# %%
layers = layer_inputs(lab, lab.validation[:2])
weights = [(q @ k.mT / D**0.5).double().softmax(-1).numpy() for q, k, _ in layers]
q, k, _ = (x.double().numpy() for x in layers[-1])
few = torch.from_numpy(q @ linformer.project(k, linformer.segment_means(32, 128)).swapaxes(2, 3) / D**0.5).softmax(-1)
drawn, (left, right) = panels(2, width=7.4, height=2.8)
for panel, held, name in ((left, weights[-1], "key"), (right, few.numpy(), "slot")):
    heatmap(panel, held[0, 0], "weight", limit=0.2)
    panel.set(xlabel=name, ylabel="query", title=f"{held.shape[-1]} weights for a query")
drawn

# %% [markdown]
# On the left bright diagonals: this head copies, from exactly one place. On the right they are blurs: who wants one key
# gets the mean of the four in its slot.
#
# ## Are the matrices simple?
#
# How many slots would be enough if they were chosen well? A matrix of T × S weights is a sum of simple ones, a column
# times a row, each with a factor, its singular value. If a few of these are much larger than the rest, few slots can
# hold what the matrix says (it has a low rank, nearly). Here is the share that the largest quarter has in the sum of
# all, layer by layer. Shuffled rows are the control: the same weights in no order. What would a matrix have whose
# singular values are all equal?

# %%
shuffled = generator.permuted(np.stack(weights), axis=-1)
quarter = lab.length // 4
ours = [linformer.rank_share(w, quarter).mean() for w in weights]
control = [linformer.rank_share(w, quarter).mean() for w in shuffled]
assert np.mean(ours) > np.mean(control)

# %% [markdown]
# A quarter (dashed). Attention lies far above, and above its shuffled self: the weights are close to low rank. In the
# first layer they are so nearly alike that the order hardly matters; in the others it is the order that makes them so.

# %%
drawn, axes = figure(height=2.6)
places = np.arange(len(ours))
axes.plot(places, ours, **series("method"), label="attention")
axes.plot(places, control, **series("muted"), label="the same weights, shuffled")
axes.axhline(0.25, **series("reference"), label="equal singular values")
axes.set(xlabel="layer", ylabel="share of the sum", ylim=(0, 1.05), xticks=places)
axes.set_title("a quarter of the singular values")
legend(axes, bbox_to_anchor=(1, 0.5), loc="center left")
drawn

# %% [markdown]
# ## Does one projection fit all texts?
#
# A low rank is a property of one matrix. E is one matrix for all texts, and knows positions only, no contents. The
# claim measures what it costs: outputs of full attention against outputs from slots, on texts that were not fitted.
# "Best of that rank" looks at each matrix and picks its own singular vectors: what low rank alone would allow. If E and
# F are trained, where will they end: close to the best, or close to the plain means of runs?

# %%
claim = linformer.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# On the right of the figure: training E and F alone beats chance by far, and the plain means of runs hardly: the gap to
# the best rank stays. Linformer's authors train the whole model around its projections, for long; what that brings is
# not shown here. But a model that was trained without them does not get them for free.

# %%
found = {name.split(", ")[-1]: x for name, x in claim.numbers.items() if f"{quarter} slots" in name}
assert found["best of that rank"] < found["trained"] < found["drawn at random"]

# %% [markdown]
# ## Who sees the future?
#
# A model that writes from left to right must not know what comes later. Replace key and value j, and see which outputs
# i change: if any does with i < j, it was told. Full causal attention and the blockwise form, which makes slots of
# finished blocks only and attends exactly within the own block, pass; Linformer does not.

# %%
rows = [x[:1, :1, :24] for x in layers[1]]
later = torch.ones(24, 24, dtype=torch.bool).triu(1)
with torch.no_grad():
    assert (influence(causal_attention, *rows)[later] == 0).all()
    assert (influence(BlockwiseAttention(*linformer.as_tensors(2, 8)), *rows)[later] == 0).all()
    assert (influence(SlotAttention(*linformer.as_tensors(6, 24)), *rows)[later] > 0).all()

# %% [markdown]
# Linformer's slots hold every position, so everything changes; slots of finished blocks keep the triangle. How much an
# output changes, from dark (not at all) to bright, shows the blocks as well: far keys act by way of slots.


# %%
def who_changes(block=8):
    """Linformer and its blockwise form, side by side."""
    drawn, axes = panels(2, width=7.0, height=2.8)
    modules = {"Linformer": SlotAttention(*linformer.as_tensors(6, 24))}
    modules["blockwise"] = BlockwiseAttention(*linformer.as_tensors(2, block))
    for panel, (title, module) in zip(axes, modules.items(), strict=True):
        change = influence(module, *rows).detach().numpy()
        heatmap(panel, np.where(change > 0, change**0.25, np.nan), "fourth root of the change")
        panel.set(xlabel="token replaced", ylabel="output", title=title)
    return drawn


# %% [markdown]
# Grey is no change at all. In a live notebook, choose the length of a block:

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
# What does that do to a language model? Trained for the next token, it learns to read it from the slots. Will its
# perplexity be better or worse than the honest model's, and what when the later tokens are not there, as when it
# writes?

# %%
perplexity = {name.removeprefix("perplexity, "): x for name, x in claim.numbers.items() if "perplexity" in name}
print({name: round(x, 1) for name, x in perplexity.items()})
assert perplexity["Linformer"] < perplexity["base"] < perplexity["Linformer, later tokens absent"]
assert perplexity["base"] < perplexity["blockwise"] < perplexity["Linformer, later tokens absent"]

# %% [markdown]
# Far better, and worth nothing. A perplexity that is too good is the usual sign of a mask that leaks. The honest way to
# few slots, blockwise, pays for them with a little perplexity, and here nothing was trained for it.
#
# ## The kernel
#
# No query may start before the last token has been added to every slot, so there are two launches: one adds up the
# slots, one lets tiles of queries pass the slots, which stay on chip. So q, k, v and the output pass through memory
# once, and the scores of 4,096 queries with 128 slots never do. Operators one by one write and read them twice, as
# scores and as weights:

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
# The tests say what is left to you: the projection, the blockwise form, the share of a rank, and two pieces of the
# kernels.
#
# ```
# python -m chapters exercise linformer --to my
# python -m pytest --submission my tests/attention/test_linformer.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["linformer"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["linformer"])) == 5
