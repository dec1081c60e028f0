# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Weight-only product: a few bits in memory, numbers only on the way through
#
# To write one token, a language model reads all of its weights and does two operations with each. A GPU can do
# hundreds of operations in the time in which it reads one weight, so it waits. If the weights are codes of 4 bits,
# it reads a quarter, and has plenty of time to turn each code back into a number before it multiplies.
#
# Where the codes come from is told elsewhere (GPTQ is the next chapter). This notebook is about how to hold them.

# %%
import tempfile

import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import weight_only
from kernels import bench, check, hardware
from kernels.quantization import weight_only as kernel
from minitfm import checkpoint, surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Here is what a decode step of our model reads (one token written, all weights read once). Most of it are the linear
# layers of the blocks. In a large model, whose vocabulary is small beside its layers, they are nearly everything. These
# are what we pack.

# %%
linear = sum(layer.weight.numel() for layer in surgery.linears(lab.model()).values())
parts = {"linear layers of the blocks": linear, "embedding, norms": lab.parameters - linear}
assert linear > 0.5 * lab.parameters
drawn, axes = figure(height=1.8)
axes.barh(list(parts), [2 * count / 1e6 for count in parts.values()], color=COLOURS["baseline"])
axes.set(xlabel="megabytes read for a token, in 16 bits")
axes.invert_yaxis()
drawn

# %% [markdown]
# ## Codes on a grid
#
# A row of weights, or a group of neighbours in it, gets a scale and a zero point: the code `zero` means 0, and each
# step up or down is one `scale`. With 4 bits there are 16 values. `nearest_codes` spreads them from the smallest weight
# of the group to the largest and takes the nearest for each. Here are 24 weights, their codes, and the values that the
# codes stand for. Where the notebook is live, give it fewer bits, or larger groups, and compare left and right: when do
# neighbours become equal?

# %%
weight = lab.weights["blocks.1.feed_forward.up_proj.weight"].numpy().astype(float)
held = weight_only.nearest_codes(weight, group_size=32)


def side_by_side(bits=4, group_size=32):
    found = weight_only.nearest_codes(weight, group_size, bits)
    parts = {"weight": weight, "code": found.codes, "value": found.dequantize()}
    drawn, axes = panels(3, width=10.8, height=2.6)
    for place, (words, part) in zip(axes, parts.items(), strict=True):
        heatmap(place, part[2:6, :6], words, digits=0 if words == "code" else 2)
        place.set(xlabel="column", ylabel="row", yticks=range(4), yticklabels=range(2, 6))
    return drawn


# %% [markdown]
# Rows have grids of their own: one code stands for different values in different rows.

# %%
explore(side_by_side, bits=[4, 3, 2], group_size=[32, 64, 128])

# %% [markdown]
# Measured over the whole layer: nearly every weight moves by half a step at most. (The ends of a range may move a
# little further, because the zero point and the scale are rounded, too.)

# %%
moved = np.abs(held.dequantize() - weight) / held.scale[:, held.group_of_column]
assert held.codes.max() <= 15 and np.mean(moved < 0.5 + 1e-9) > 0.9

# %% [markdown]
# ## Packing
#
# `pack` puts eight codes into an int32, in an order made for the kernel: four words, 16 bytes, are what one GPU
# thread loads at once, and they hold 32 neighbouring columns. Shifting all four words by the same amount gives four
# neighbours. Here are the columns 0 to 31, each in its place: a line for each word, the lowest bits on the left.

# %%
words, places = np.divmod(np.arange(32), 4)[::-1]
drawn, axes = figure(width=6.4, height=2.4)
layout = np.empty((4, 8))
layout[words, places] = np.arange(32)
heatmap(axes, layout, "column", digits=0)
axes.set(xlabel="place i of the word: bits 4 i to 4 i + 3", ylabel="word", title="which column lies where")
drawn

# %% [markdown]
# And the same read back from packed codes: column 6 holds 9, every other one 0. Column 6 is 4 · 1 + 2, so the code
# must be in word 2, four bits up.

# %%
codes = np.zeros((1, 32), np.uint8)
codes[0, 6] = 9
packed = weight_only.pack(codes)
print([hex(word) for word in packed[0]])
assert packed[0].tolist() == [0, 0, 9 << 4, 0] and packed.nbytes == codes.size // 2
np.testing.assert_array_equal(weight_only.unpack(weight_only.pack(held.codes)), held.codes)

# %% [markdown]
# With 2 bits the same four words hold two runs of 32 columns: the second takes the upper halves of the nibbles. With 3
# bits a run's low bits are stored like that, and the top bits of four runs share four words more: 128 columns in three
# loads. A shift and a mask bring each run back into nibbles, so all widths are read by the same code from there on.

# %%
for bits, columns in ((4, 32), (2, 64), (3, 128)):
    some = np.random.default_rng(bits).integers(0, 2**bits, (1, columns)).astype(np.uint8)
    packed = weight_only.pack(some, bits)
    print(f"{bits} bits: {columns} columns in {packed.nbytes // 16} loads of 16 bytes")
    assert packed.nbytes == some.size * bits // 8
    np.testing.assert_array_equal(weight_only.unpack(packed, bits), some)

# %% [markdown]
# A code that does not fit into its bits would spill into its neighbour and change two weights. It is refused.

# %%
try:
    weight_only.pack(codes + 8)
except ValueError as error:
    print(error)

# %% [markdown]
# ## The product
#
# `weight_only_matmul` unpacks, scales and multiplies. For one row and one group, let c be the codes, s the scale, z the
# zero point and x the activations. Scale and zero point need not be applied to each weight: the scale is the same for
# the whole group, and so is what the zero point subtracts for each activation. The kernel for one token therefore sums
# code · x and x over a group's columns and does the rest once:
#
# $$\sum_k s\,(c_k - z)\,x_k \;=\; s\,\Bigl(\sum_k c_k x_k - z \sum_k x_k\Bigr)$$

# %%
x = np.random.default_rng(0).normal(size=(3, weight.shape[1]))
y = weight_only.weight_only_matmul(x, weight_only.pack(held.codes), held.scale, held.zero, 32)
np.testing.assert_allclose(y, x @ held.dequantize().T, atol=1e-10)
groups, c = x.reshape(3, 1, -1, 32), held.codes.reshape(1, len(weight), -1, 32)
late = held.scale * ((groups * c).sum(-1) - held.zero * groups.sum(-1))  # [tokens, out, groups]
np.testing.assert_allclose(late.sum(-1), y, atol=1e-10)

# %% [markdown]
# ## In the model
#
# `WeightOnlyLinear` holds packed codes, 16-bit scales and 8-bit zero points, nothing else. So a weight takes bits + 24
# / g bits in groups of g. The claim packs all linear layers of all blocks, counts the bytes that they then hold, and
# compares logits with a model of the same rounded weights in plain layers. Smaller groups cost more bytes. What do you
# expect: do they buy anything?

# %%
claim = weight_only.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Packing itself changes nothing: what a model loses, it loses when codes are chosen. Small groups are the dear end of
# the curve, to the right, and the better one: their grids fit. How much better depends on how far the weights of a row
# differ in size, and in a small model they differ little; between 64 columns and a whole row the difference may drown
# in noise.

# %%
assert claim.holds
assert claim.numbers["bits, groups of 32"] == 4 + 24 / 32
assert claim.numbers["bits, 2 bits, groups of 32"] == 2 + 24 / 32
assert all(value < 1e-4 for name, value in claim.numbers.items() if name.startswith("moved"))

# %% [markdown]
# A model with packed layers is saved like any other. To load it, its layers must first be put in place, which
# `load_packed` does. `python -m chapters run weight_only --bits 3 --packed FOLDER` writes such a checkpoint.

# %%
model = lab.model()
done = weight_only.quantize_each(model, lambda weight: weight_only.nearest_codes(weight, 32, 3))
weight_only.use_packed(model, done, torch.float16)
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    checkpoint.save(folder, model, lab.tokenizer)
    loaded = weight_only.load_packed(folder).model
    assert torch.equal(loaded(lab.validation[:2]), model(lab.validation[:2]))

# %% [markdown]
# ## The kernel, in bytes
#
# For one token, a 4096 × 4096 layer of Llama-7B reads 33.6 MB in bfloat16, and in 4 bits and groups of 128 a
# quarter of that and a little more. For more tokens the weights are read once and multiplied more often, until
# arithmetic is what takes the time: then packing gains nothing. Here is the least time that bytes and operations need
# on an H200.

# %%
gpu, tokens = hardware.GPUS["H200"], 2 ** np.arange(12)
floors = [hardware.floor_seconds(kernel.llama_case(int(count), 4096, 4096), gpu) for count in tokens]
dense = [max(2 * (4096 * 4096 + 8192 * m) / gpu.bandwidth, 2 * m * 4096 * 4096 / gpu.bf16) for m in tokens]
two = [hardware.floor_seconds(kernel.llama_case(int(count), 4096, 4096, bits=2), gpu) for count in tokens]

# %% [markdown]
# Fewer bits lower the line as long as reading the weights is what takes the time: the flat part. From its end on all
# three wait for the same multiplications. The fewer bits, the earlier that end.

# %%
drawn, axes = figure(height=2.8)
axes.loglog(tokens, 1e6 * np.array(dense), **series("baseline"), label="bfloat16")
axes.loglog(tokens, 1e6 * np.array(floors), **series("method"), label="4 bits, groups of 128")
axes.loglog(tokens, 1e6 * np.array(two), **series("second"), label="2 bits, groups of 128")
axes.set(xlabel="tokens multiplied at once", ylabel="least time, µs", title="codes pay until arithmetic takes over")
legend(axes)
drawn

# %% [markdown]
# One token gains nearly 4 times, in 2 bits nearly 8 times, a prompt of 2048 tokens nothing.

# %%
assert 3.7 < dense[0] / floors[0] < 4 and 7 < dense[0] / two[0] < 8 and dense[-1] == floors[-1] == two[-1]

# %% [markdown]
# What a kernel needs to come near its floor can be seen without a GPU, in the machine code that the compiler makes
# for one (here an H100 or H200, sm_90): no spilled registers, loads of 128 bits. One token multiplies in registers;
# 16 tokens and more unpack the weights for the tensor cores. `combine_kernel` adds what programs that share a tile
# have found.

# %%
report = check.static_report("quantization.weight_only", [90])
for row in [row for row in report if "11008" not in row["case"]]:
    print(f"{row['case']:30} {row['kernel']:15} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions'] or 'none'}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside cuBLAS on the dense weight and torch's own 4-bit product:

# %%
for row in bench.recorded("quantization.weight_only"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.weight_only"):
    print("not recorded yet: python -m kernels bench quantization.weight_only, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: packing, the reference of the product, and the kernel for one token.
#
# ```
# python -m chapters exercise weight_only --to my
# python -m pytest --submission my tests/quantization/test_weight_only.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["weight_only"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["weight_only"])) == 3
