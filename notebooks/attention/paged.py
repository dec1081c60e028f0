# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # PagedAttention
#
# A cache that must lie in one piece has to be reserved for the longest answer there might be, and most of it stays
# empty. Operating systems solved this for memory long ago: cut it into pages, and let a table say where they are.
# PagedAttention (Kwon et al. 2023) does that with keys and values.
#
# Everything below runs on the book's base model, a small transformer that was trained on documentation.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.attention import paged
from chapters.attention.paged import BlockManager
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, series
from chapters.lab import Lab
from chapters.shared.paged_cache import PagedCache, Pool, attend
from chapters.shared.serving import Request, draw_requests, serve
from kernels import bench, check, hardware
from kernels.attention import paged as kernel
from minitfm.generate import generate

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Here are twenty-four requests as people make them: most are short, a few long, and nobody knows beforehand. A filled
# bar is what a request will need at its end, a position for each token of prompt and answer. Hatched is what must be
# reserved, for any of them might become as long as the model's context.

# %%
requests, context = draw_requests(lab, 0, 24), lab.config.context
ends = sorted(len(request.prompt) + request.count for request in requests)


def reserved(size=16):
    """What the requests use, and what they hold in whole pieces of `size` positions."""
    held = [-(-n // size) * size for n in ends]
    drawn, axes = figure(height=2.6)
    axes.bar(range(24), held, color="white", edgecolor=COLOURS["baseline"], hatch="////")
    axes.bar(range(24), ends, color=COLOURS["method"])
    axes.set(xlabel="request, the shortest first", ylabel="positions", ylim=(0, 1.02 * context))
    return drawn, axes, f"pieces of {size}: {1 - sum(ends) / sum(held):.0%} of the memory is empty"


# %% [markdown]
# Below, one piece of the whole context for each:

# %%
drawn, axes, title = reserved(context)
axes.set_title(title)
assert np.mean(ends) < 0.5 * context
drawn

# %% [markdown]
# ## Blocks and tables
#
# Cut the memory into blocks of B positions. A sequence owns a list of blocks, its table: position j lies in block
# `table[j // B]`, slot `j % B`. The blocks may lie anywhere, and only the last one is not full. `BlockManager` keeps
# the books; it deals in ids and has no memory itself. Here two sequences of 10 and 5 positions, and B = 4:

# %%
manager = BlockManager(blocks=12, block_size=4)
manager.allocate(0, 10)
manager.allocate(1, 5)
print(manager.tables, "free:", manager.free_blocks)
manager.append(0, 3)  # the last block had two slots left: one block more
print(manager.tables)
assert len(manager.tables[0]) == 4 and len(manager.tables[1]) == 2

# %% [markdown]
# Less than a block is empty per sequence, whatever its length, and half a block on average, if all lengths are equally
# likely. How much of the memory of the requests above will be empty in blocks of 16?

# %%
lengths = np.arange(1, 257)
for size in (16, 64):
    held = np.array([BlockManager(64, size).blocks_for(n) * size for n in lengths])
    assert (held - lengths < size).all() and np.isclose((held - lengths).mean(), (size - 1) / 2)


def in_blocks(size=16):
    drawn, axes, title = reserved(size)
    axes.set_title(f"{title}; {sum(-(-n // size) for n in ends)} table entries")
    return drawn


# %% [markdown]
# The smaller the blocks, the less is wasted, and the longer the tables. Live, turn the knob from a table entry for each
# token to the single piece of above.

# %%
explore(in_blocks, size=[1, 4, 16, 64, 128, context])

# %% [markdown]
# ## Copy on write
#
# A block may stand in two tables. `fork` begins a sequence with what another one has: it counts one more owner for
# each block, and that is all. Who writes first in a shared block copies it; the last owner writes in place.

# %%
manager = BlockManager(blocks=12, block_size=4)
manager.allocate(0, 10)
manager.fork(0, 1)
manager.fork(0, 2)
print("shared by three:", manager.tables, "free:", len(manager.free_blocks))
copies = [manager.append(sequence) for sequence in (0, 1, 2)]
print("copies:", copies, manager.tables)
assert [len(each) for each in copies] == [1, 1, 0] and len(manager.free_blocks) == 7

# %% [markdown]
# The picture shows whose block is whose: two full blocks are owned by all three, and each has a last one of its own.

# %%
owned = np.full((3, 12), np.nan)
for sequence, table in manager.tables.items():
    owned[sequence, table] = [manager.owners[block] for block in table]
drawn, axes = figure(width=5.6, height=1.8)
heatmap(axes, owned, "owners", limit=5, digits=0)
axes.set(xlabel="block", ylabel="sequence", title="five blocks hold what would take nine")
assert np.isfinite(owned).any(axis=0).sum() == 5 and np.isfinite(owned).sum() == 9
drawn

# %% [markdown]
# ## Attention through a table
#
# `paged_attention` is attention as ever, but for where it finds its keys. Queries of several sequences stand end to
# end: here one decodes its eleventh token while another brings a whole prompt of six. Keys of unused slots are NaN (not
# a number, and whatever it is added to becomes NaN), and the second table ends in an id that no block has. The output
# is finite: neither was read.

# %%
rng = np.random.default_rng(0)
keys, values = (np.full((8, 4, 1, 16), np.nan) for _ in "kv")  # 8 blocks of 4 positions, one head of 16
tables = np.array([[5, 0, 3], [6, 2, 99]])
for pool in (keys, values):
    for table, length in zip(tables, (11, 6), strict=True):
        for j in range(length):
            pool[table[j // 4], j % 4] = rng.normal(size=(1, 16))
out = paged.paged_attention(rng.normal(size=(7, 2, 16)), keys, values, tables, np.array([11, 6]), new=np.array([1, 6]))
assert out.shape == (7, 2, 16) and np.isfinite(out).all()

# %% [markdown]
# This is the pool: dark the first sequence, bright the second, the number is the position. Grey slots are the NaN.

# %%
drawn, axes = figure(width=4.0, height=2.8)
whose = np.full((8, 4), np.nan)
for sequence, (length, ink) in enumerate(((11, "white"), (6, "black"))):
    for j in range(length):
        whose[tables[sequence, j // 4], j % 4] = sequence
        axes.text(j % 4, tables[sequence, j // 4], f"{j}", color=ink, ha="center", va="center")
heatmap(axes, whose, "sequence", limit=1.6)
axes.set(xlabel="slot", ylabel="block", title="scattered, and found by the table")
drawn

# %% [markdown]
# ## In the model
#
# `PagedCache` is a cache like any other: the model does not see that its keys lie in pieces, and writes the same text.

# %%
model, prompt = lab.model(), lab.validation[:1, :40]
alone = generate(model, prompt, 30)
pool = Pool(lab.config, BlockManager(64, 16))
assert torch.equal(generate(model, prompt, 30, cache=PagedCache(pool)), alone)
print(lab.tokenizer.decode(alone[0, 40:].tolist()))

# %% [markdown]
# Four answers to one prompt, each drawn with another seed, are one pass over the prompt and three forks. They share its
# blocks, and each copies only the block in which it begins to differ. How much does that save in the end, when the
# answers are as long as the prompt?

# %%
answers = [Request(prompt[0].tolist(), 40, temperature=1.0, seed=seed) for seed in range(4)]
pool = Pool(lab.config, BlockManager(64, 16))
steps = serve(lab.model(attend=attend), pool, answers, share=True)
drawn, axes = figure(height=2.4)
axes.plot([step.apart for step in steps], **series("baseline"), markevery=10, label="each its own")
axes.plot([step.blocks for step in steps], **series("method"), markevery=10, label="shared")
axes.set(xlabel="pass of the model", ylabel="blocks in use", ylim=(0, None), title="the prompt is held once")
legend(axes)
assert all(step.blocks < step.apart for step in steps)
drawn

# %% [markdown]
# ## One pool for all
#
# `serve` steps all requests that fit, each at a position of its own, and lets in the next when one is done. When the
# pool runs out, the request that came last goes back to wait and is computed again later. The claim does this with the
# requests from above, on a pool of two contexts, and compares every token with generating each request alone. In one
# piece each, two requests would fit. How many will run at a time in blocks?

# %%
claim = paged.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# What is in blocks (solid) stays close to what is held (dotted) and under the line of the pool, until requests run out;
# to reserve a context for each of those that run would take many times the pool. The paper measured that earlier
# systems left 60 to 80% of this memory empty. Ours would, too. Blocks leave a few percent: half a block for each, and
# our texts are a quarter as long as the paper's. What the figure does not show is speed: more requests at a time make a
# server faster only because a step, which reads all weights, then serves more of them.

# %%
assert claim.holds and claim.numbers["tokens that differ from generating alone"] == 0
assert claim.numbers["part empty, blocks"] < 0.2 < 0.6 < claim.numbers["part empty, contexts reserved"]
assert claim.numbers["empty positions of a sequence, worst pass"] < 16
assert claim.numbers["sequences at a time, blocks"] > 2

# %% [markdown]
# ## The kernel, in bytes
#
# A decode step reads each key and value once and does next to nothing with it, so time is bytes. The naive way gathers
# the blocks of every sequence into one piece and attends to that: read, written, read again. The kernel follows the
# table, 4 bytes a block. Here for 16 sequences of 8,192 tokens in a layer of Llama-3-8B: keys and values, 8 heads of
# 128 channels, 2 bytes a number.

# %%
case, gpu = kernel.CASES[1], hardware.GPUS["H200"]
numbers = 2 * 16 * 8192 * 8 * 128
moved = {"gather, then attend": 3 * 2 * numbers, "through the table": case.bytes}
drawn, axes = figure(height=1.6)
axes.barh(list(moved), [1e6 * size / gpu.bandwidth for size in moved.values()], color=COLOURS["method"])
axes.set(xlabel="least time on an H200, µs", title=f"{case.bytes / 1e6:.0f} MB, or three times as much")
assert 2.9 < moved["gather, then attend"] / moved["through the table"] < 3
drawn

# %% [markdown]
# The tables are nothing beside what they point to. All query heads that share a key head are rows of one product, so
# that no key is read twice; long sequences are cut into shares, so that few of them fill a GPU. What the compiler
# makes of it for an H100 or H200 can be seen without one:

# %%
report = check.static_report("attention.paged", [90])
for row in report:
    print(f"{row['case']:32} {row['kernel']:15} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's own attention on a cache in one piece:

# %%
for row in bench.recorded("attention.paged"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("attention.paged"):
    print("not recorded yet: python -m kernels bench attention.paged, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: append, fork and free of the manager, attention through tables, and the kernel.
#
# ```
# python -m chapters exercise paged --to my
# python -m pytest --submission my tests/attention/test_paged.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["paged"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["paged"])) == 5
