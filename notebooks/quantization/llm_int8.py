# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # LLM.int8(): eight bits for nearly everything, sixteen for a few columns
#
# Large language models have a few channels whose activations are tens of times larger than all others. They are few,
# always the same, and cannot be left out; and they spoil 8-bit arithmetic, because a row's scale must reach up to
# them. LLM.int8 computes those columns apart, in full precision, and everything else in int8.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import llm_int8
from kernels import bench, check
from kernels.quantization import llm_int8 as kernel
from minitfm import surgery

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()
model, name = llm_int8.planted(lab, seed=0), "blocks.1.attention.q_proj"

# %% [markdown]
# ## What hurts
#
# Small models grow no such channels, so we plant some: two channels of every norm's gain are multiplied by 64, and the
# columns of the layers that read them divided by 64. The model computes the same as before. Here is what reaches one of
# its layers: 48 tokens, one a row (colours end at 4, or nothing else could be seen), and the largest of each channel.

# %%
((_, seen),) = surgery.record_inputs(model, lab.validation[:4], [name])
x = seen.flatten(0, 1).double().numpy()
largest = np.abs(x).max(axis=0)
drawn, axes = panels(2, width=9.0, height=2.6)
heatmap(axes[0], np.abs(x[:48]), "|x|", limit=4)
axes[0].set(xlabel="channel", ylabel="token", title="two stripes")
axes[1].bar(np.arange(len(largest)), largest, color=COLOURS["baseline"])
axes[1].set(xlabel="channel", ylabel="largest |x|", title="far above the rest")
drawn

# %% [markdown]
# An int8 code is a whole number from −127 to 127. With one scale for each row, its largest magnitude / 127 (`absmax`),
# an outlier decides how fine the grid is on which all other numbers of the row must lie. How many of the 255 codes do
# those still use?

# %%
codes, absmax, _ = llm_int8.quantize_rows(x)
_, _, outliers = llm_int8.quantize_rows(x, threshold=6.0)
ordinary = np.setdiff1d(np.arange(x.shape[1]), outliers)
print(f"{len(outliers)} outlier columns of {x.shape[1]}")
print(f"{np.mean(np.abs(codes[:, ordinary]) <= 2):.0%} of the other codes are at most 2 of 127")
assert 2 <= len(outliers) < 0.2 * x.shape[1] and np.mean(np.abs(codes[:, ordinary]) <= 2) > 0.5

# %% [markdown]
# ## Taking the outliers out
#
# `quantize_rows` looks for the columns in which any token has a magnitude of at least the threshold. Scales are taken
# over what lies below it, and the outlier columns get the code 0. Turn the threshold where the notebook is live: where
# do codes begin to use the whole range, and how many columns does that cost? (At 0 no column is taken out.)


# %%
def codes_at(threshold=6.0):
    drawn, axes = panels(2, width=9.0, height=2.8, sharey=True)
    after, _, out = llm_int8.quantize_rows(x, threshold=threshold)
    for panel, held, role in zip(axes, (codes, after), ("baseline", "method"), strict=True):
        panel.hist(held[:, ordinary].ravel(), bins=np.arange(-127.5, 128, 5), color=COLOURS[role], log=True)
        panel.set(xlabel="code of an ordinary column")
    axes[0].set(ylabel="numbers", title="plain: most codes idle")
    axes[1].set(title=f"threshold {threshold:g}: {len(out)} columns taken out")
    return drawn


# %% [markdown]
# On the left a peak at 0, on the right a hill that reaches both ends.

# %%
explore(codes_at, threshold=[0.0, 2.0, 4.0, 6.0, 24.0, 96.0])

# %% [markdown]
# A small case by hand. The third column is an outlier column because of one token. That column's small number, −5,
# still counts for the scale of its own row, as in the library: one look at each number settles maxima and outliers.

# %%
small = np.array([[1.0, 0.5, 40.0], [2.0, -1.0, -5.0]])
small_codes, small_absmax, columns = llm_int8.quantize_rows(small, threshold=6.0)
print(small_codes, small_absmax, columns)
assert small_codes.tolist() == [[127, 64, 0], [51, -25, 0]] and small_absmax.tolist() == [1, 5]

# %% [markdown]
# ## The product
#
# The weights are quantized by the same function, without a threshold. An int8 product, two scales, and the outlier
# columns on top. What the outliers are multiplied by is where paper and library part: the paper takes weights that
# were never rounded (`exact`) and must keep them all, since any column may become one; the library takes the codes.

# %%
weight = model.get_parameter(f"{name}.weight").detach().double().numpy()
weight_codes, weight_absmax, _ = llm_int8.quantize_rows(weight)
truth, errors = x @ weight.T, {}
for title, how in {"no outlier columns": (0.0,), "library": (6.0,), "paper": (6.0, weight)}.items():
    y = llm_int8.llm_int8_matmul(x, weight_codes, weight_absmax, *how)
    errors[title] = np.linalg.norm(y - truth) / np.linalg.norm(truth)

# %% [markdown]
# The outlier columns are what the error came from: 1 would be an output that is all error.

# %%
drawn, axes = figure(height=2.2)
axes.barh(list(errors), list(errors.values()), color=COLOURS["method"])
axes.set(xlabel="relative error of the layer's output", title="two columns apart, a fraction of the error")
axes.invert_yaxis()
drawn

# %% [markdown]
# Planting is hard on the library's variant: the columns of the planted channels were divided by 64 and nearly vanish
# on the grid of their rows. In large models the weights of outlier channels are of ordinary size.

# %%
assert errors["paper"] < 0.2 * errors["no outlier columns"] and errors["paper"] < errors["library"]
print(f"codes of planted columns: at most {np.abs(weight_codes[:, np.argsort(largest)[-2:]]).max()}")

# %% [markdown]
# ## The company of a token
#
# Which columns are outliers depends on the whole batch. The same token is therefore computed differently when another
# one beside it has an outlier: by a rounding, but differently. Results depend on how requests are batched, and in a
# prompt on tokens that come later. It is the price of finding outliers at run time.

# %%
tokens = np.array([[1.0, 0.3003], [0.5, 60.0]])
ones = np.full((1, 2), 127, np.int8), np.ones(1, np.float32)
alone, together = llm_int8.llm_int8_matmul(tokens[:1], *ones), llm_int8.llm_int8_matmul(tokens, *ones)[:1]
print(alone.item(), together.item())
assert 0 < abs(alone - together).item() < 0.002

# %% [markdown]
# ## In the model
#
# `Int8Linear` holds codes and scales and stands where a linear layer stood. The claim replaces all linear layers of
# all blocks, by 8-bit layers of several kinds, and sweeps the threshold. At a threshold of 2 about half of all columns
# are "outliers", at 96 hardly any. What is the largest threshold that you would dare?

# %%
claim = llm_int8.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Both variants hold where plain rounding does not, as long as the threshold lies below the planted outliers. From 2 to
# 24 it matters little: there is a gap between the two kinds of channels. Models whose channels are spread more evenly
# have no such gap, and this sweep says nothing about them.

# %%
assert claim.holds
rises = {name: value for name, value in claim.numbers.items() if name.startswith("rise")}
assert rises["rise, LLM.int8, paper"] < rises["rise, LLM.int8, library"] < rises["rise, vector-wise"]
assert rises["rise, vector-wise"] < rises["rise, one scale each"]

# %% [markdown]
# ## The kernel, in bytes
#
# Done by separate operators, maxima, codes, outlier columns, an int32 result, and a second product all go through
# memory. The kernel reads x twice (once for the maxima and the marks of outlier columns, once to multiply), the weights
# once, and writes y. It quantizes each tile of x in registers, and where a tile of columns holds an outlier, multiplies
# the same tile once more in 16 bits. Bytes for a 4096 × 4096 layer:

# %%
rows, K, N = 2 ** np.arange(12), 4096, 4096
apart = 6 * rows * K + N * K + 14 * rows * N
fused = [kernel.llama_case(int(count), N, K).bytes for count in rows]
drawn, axes = figure(height=2.8)
axes.loglog(rows, apart / 1e6, **series("baseline"), label="separate operators")
axes.loglog(rows, np.array(fused) / 1e6, **series("method"), label="fused")
axes.set(xlabel="rows of x (tokens)", ylabel="megabytes moved", title="fusing pays once there are many rows")
legend(axes)
drawn

# %% [markdown]
# For few rows the weights are all that counts, and int8 halves them. For many, the fused kernel moves about a third.

# %%
assert apart[0] / fused[0] < 1.05 and 2.5 < apart[-1] / fused[-1] < 3

# %% [markdown]
# What the compiler makes of it can be seen without a GPU (here for an H100 or H200): loads of 128 bits, both kinds of
# tensor-core instructions (`IMMA`, `IGMMA`: int8; `HMMA`, `HGMMA`: 16 bits), no spilled registers.

# %%
report = check.static_report("quantization.llm_int8", [90])
for row in report:
    if row["kernel"] == "matmul_kernel":
        print(f"{row['case']:40} {row['registers']} registers, {row['load_bits']}-bit loads, "
              f"{row['spill_bytes']} bytes spilled, tensor cores: {row['tensor_instructions']}")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside the separate operators and cuBLAS in 16 bits:

# %%
for row in bench.recorded("quantization.llm_int8"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.llm_int8"):
    print("not recorded yet: python -m kernels bench llm_int8, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: codes and outlier columns, the reference of the product, and both kernels.
#
# ```
# python -m chapters exercise llm_int8 --to my
# python -m pytest --submission my tests/quantization/test_llm_int8.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["llm_int8"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["llm_int8"])) == 4
