# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Bring your own model
#
# What the chapters do to the book's model, done to yours: GPTQ (weights in 4 and 3 bits), SmoothQuant (weights and
# activations in 8) and 2:4 sparsity (half of the weights gone), the same measurements and the same figures. A model of
# yours may be large. So its weights stay in 16 bits, as they were stored, and only one block at a time is computed in
# float32; what is compressed replaces what it was made from.

# %%
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from chapters import leaderboard
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import encode_halves, library_streams
from chapters.pruning import wanda
from chapters.quantization import gptq, smoothquant, weight_only
from chapters.shared.memory import resident_growth
from chapters.sparsity import n_m
from minitfm import blockwise, checkpoint, data, export
from minitfm.config import Config
from minitfm.model import Transformer

torch.set_num_threads(1)  # so small a model is fastest on one; leave this out for a large one

# %% [markdown]
# ## Your folder
#
# Change the two names below: `FOLDER` to a Hugging Face folder of the Llama family (`config.json`, safetensors in one
# file or several, `tokenizer.json`), `TEXT` to a text file or a folder of them. Nothing is fetched from anywhere. As
# they stand, they are the book's own model, written as others would write it, in bfloat16, and the documentation of
# Python's standard library.

# %%
FOLDER = TEXT = None

# %% [markdown]
# `export.hugging_face` writes any of the book's models so that other programs can read it.

# %%
temporary = Path(tempfile.mkdtemp())
if FOLDER is None:
    FOLDER, base = temporary / "llama", checkpoint.base()
    export.hugging_face(FOLDER, base.model, base.tokenizer)
for path in sorted(Path(FOLDER).iterdir()):
    print(f"{path.name:20} {path.stat().st_size / 1e6:6.2f} MB")

# %% [markdown]
# ## Loaded as it was stored
#
# With `dtype=None` numbers stay in the type that they were stored in. Each technique below starts from a fresh load,
# so that never two models are in memory. Of this one we keep a single matrix, to compare with.

# %%
load = partial(checkpoint.load, FOLDER, dtype=None)
model, tokenizer, _ = load()
config, stored, size = model.config, model.head.weight.dtype, blockwise.held_bytes(model)
name = f"blocks.{config.layers // 2}.attention.q_proj"
weight = model.get_parameter(f"{name}.weight").detach().float()
print(f"{config.layers} blocks, {model.num_parameters():,} parameters in {stored}, {size / 1e6:.2f} MB")
assert blockwise.bits_per_weight(model) == 8 * stored.itemsize

# %% [markdown]
# Text to calibrate on, and text to measure on from other documents: 64 sequences of 128 tokens, as in the chapters,
# or of the model's context if that is shorter. Perplexity counts the tokens between which the model is undecided, on
# average; for one that knows nothing it is the size of the vocabulary. The assertion says whether this model knows such
# text at all.

# %%
train, held_out = library_streams(tokenizer) if TEXT is None else encode_halves(tokenizer, Path(TEXT))
length = min(128, config.context)
calibration, measured = data.random_batch(train, 32, length, 0), data.sequences(held_out, length)
measured = measured[torch.linspace(0, len(measured) - 1, min(64, len(measured))).long()]
before = blockwise.perplexity(model, measured)
print(f"perplexity {before:.2f}")
assert before < config.vocab_size / 4
del model

# %% [markdown]
# ## One block at a time
#
# `blockwise.compress` copies one block in float32 into a model of its own, whose embedding is what reaches that block:
# its "tokens" are places in the calibration text. To a chapter that is a model like any other, and what the chapter
# leaves takes the block's place. Then the text moves on through it to the next block.
#
# `try_out` does that to a fresh load and notes what came out, counted in the bytes that the blocks then hold. It keeps
# that one matrix and, if asked, saves the rest.

# %%
points, changed = [], {}


def try_out(technique: str, setting: str, change: blockwise.Change, folder: Path | None = None) -> None:
    model = load().model
    blockwise.compress(model, calibration, change)
    bits, after = blockwise.bits_per_weight(model), blockwise.perplexity(model, measured)
    points.append(leaderboard.Point(technique, setting, bits, after))
    print(f"{setting}: {bits:.2f} bits, {blockwise.held_bytes(model) / 1e6:.2f} MB, perplexity {after:.2f}")
    changed[setting] = model.get_submodule(name).weight().float()
    if folder is not None:
        checkpoint.save(folder, model, tokenizer, {"technique": technique})


# %% [markdown]
# ## GPTQ, 4 and 3 bits
#
# Rounds column by column and lets later columns repair the error. Codes are packed, 32 columns share a grid (a scale
# and a zero point: they are why more than 4 bits are counted below); for a wide model 128 are usual. From 16 bits to 4,
# twelve are lost, and from 4 to 3 one. Which step do you expect to cost more?


# %%
def in_few_bits(block: Transformer, places: torch.Tensor, bits: int) -> None:
    weight_only.use_packed(block, gptq.quantize_model(block, places, bits, group_size=32), torch.float16)


try_out("quantization.gptq", "GPTQ, 4 bits", partial(in_few_bits, bits=4), temporary / "packed")
try_out("quantization.gptq", "GPTQ, 3 bits", partial(in_few_bits, bits=3))

# %% [markdown]
# Four bits cost little, three cost more. What a model can bear differs; a large one bears more than a small one.

# %%
assert before < 1.01 * points[0].perplexity < 1.2 * before and points[0].perplexity < points[1].perplexity

# %% [markdown]
# ## Outlier channels, and SmoothQuant
#
# Int8 for activations, too. On the way we note the largest input of each channel that the block's attention reads,
# before and after smoothing: channels far above the rest are what breaks int8.

# %%
reader, maxima = "blocks.0.attention.q_proj", []


def in_int8(block: Transformer, places: torch.Tensor) -> None:
    rough = smoothquant.input_maxima(block, places, [reader])[reader]
    smoothquant.smooth_model(block, places)
    maxima.append((rough, smoothquant.input_maxima(block, places, [reader])[reader]))
    smoothquant.quantize_model(block, places)


try_out("quantization.smoothquant", "SmoothQuant, W8A8", in_int8)

# %% [markdown]
# Here is the block whose channels are most unequal, from the least to the largest. Models of billions of parameters
# grow a few channels that are a hundred times as large as the others, at the right; the book's model has a few that are
# hardly used, at the left. Smoothing evens out either.


# %%
def spread_of(largest: torch.Tensor) -> float:
    return float(largest.max() / largest.clamp_min(smoothquant.LEAST).min())


most = int(np.argmax([spread_of(rough) for rough, _ in maxima]))
drawn, axes = figure(height=3.2)
for values, words, role in zip(maxima[most], ("as loaded", "smoothed"), ("baseline", "method"), strict=True):
    axes.plot(sorted((values / values.median()).tolist()), **series(role) | {"marker": ""}, label=words)
axes.set(xlabel=f"channel of block {most}, sorted", ylabel="largest |input| / median", yscale="log")
axes.set(title="what reaches the block's attention")
legend(axes)
drawn

# %% [markdown]
# Eight bits on both sides cost next to nothing.

# %%
rough, even = maxima[most]
assert spread_of(even) < spread_of(rough) and points[-1].perplexity < 1.05 * before

# %% [markdown]
# ## 2:4, by Wanda's score
#
# Of four neighbours the two stay whose size times the norm of their input is largest. Values stay in 16 bits, and two
# bits say where each of them stands: 9 bits for a weight. That is about twice as many as GPTQ took. Nearer to the
# model as loaded, or further away?


# %%
def half_of_them(block: Transformer, places: torch.Tensor) -> None:
    wanda.prune_model(block, places, partial(wanda.find_mask, sparsity=0.5, pattern=(2, 4)))
    block.blocks[0].to(stored)
    n_m.compress_model(block)


try_out("pruning.wanda", "2:4", half_of_them)

# %% [markdown]
# Half of the weights gone without training costs much more than half of the bits. That is why what is pruned is
# trained again (`pruning/magnitude`), or repaired (`pruning/sparsegpt`).

# %%
assert points[-1].perplexity > points[0].perplexity and abs(points[-1].bits - 9) < 0.1

# %% [markdown]
# ## Quality against size
#
# The book's leaderboard, with your model on it: to the left is smaller, down is better.

# %%
board = leaderboard.merged(None, before, points)
leaderboard.picture(board)

# %% [markdown]
# ## Where the errors are
#
# A corner of one matrix: what each technique has changed. GPTQ moves every weight a little, by up to half a step of
# its group's grid and by what it repairs; 2:4 changes half of them by all that they were.

# %%
errors = {words: changed[words] - weight for words in ("GPTQ, 4 bits", "GPTQ, 3 bits", "2:4")}
limit = float(errors["2:4"][:24, :24].abs().max()) / 2
drawn, axes = panels(3, width=9.6, height=2.6)
for place, (words, error) in zip(axes, errors.items(), strict=True):
    heatmap(place, error[:24, :24].numpy(), "weight error", limit=limit)
    place.set(title=f"{words}: what changed", xlabel="input", ylabel="output")
drawn

# %% [markdown]
# In the square, over the whole matrix:

# %%
share = {words: float(error.square().sum() / weight.square().sum()) for words, error in errors.items()}
print(", ".join(f"{words}: {part:.1%} of the weights' squares" for words, part in share.items()))
assert share["GPTQ, 4 bits"] < share["GPTQ, 3 bits"]
assert abs(float((errors["2:4"] == -weight).float().mean()) - 0.5) < 0.01

# %% [markdown]
# ## Keep it
#
# `checkpoint.save` has written what the blocks of the first model hold. Who loads it says which chapter packed them.

# %%
again = checkpoint.load(temporary / "packed", prepare=weight_only.place_packed, dtype=None).model
print(f"{(temporary / 'packed' / 'model.safetensors').stat().st_size / size:.0%} of the folder's weights")
np.testing.assert_allclose(blockwise.perplexity(again, measured), points[0].perplexity, rtol=1e-5)

# %% [markdown]
# ## How much memory that took
#
# The book's model is too small for its weights to be seen beside Python itself. So, unless your folder is large, here
# is one of random weights. `resident_growth` starts a fresh Python, and asks the system by how much the memory that it
# occupies has grown at its peak, after all imports.

# %%
large = Path(FOLDER)
if size < 50e6:
    large, sizes = temporary / "large", Config(131072, dim=320, heads=5, hidden_dim=768, layers=16)
    export.hugging_face(large, Transformer(sizes), tokenizer)
on_disk = sum(path.stat().st_size for path in large.glob("*.safetensors"))
print(f"{on_disk / 1e6:.0f} MB")

# %% [markdown]
# Once by way of the float32 model that the chapters work on, once block by block:

# %%
imports = "import torch\nfrom chapters.quantization import gptq\nfrom minitfm import blockwise, checkpoint"
start = "tokens = torch.arange(1024).view(8, 128)\nmodel = checkpoint.load"
ways = {"float32": f"{start}({str(large)!r}).model\ngptq.quantize_model(model, tokens, 4)"}
ways["block by block"] = f"{start}({str(large)!r}, dtype=None).model\n"
ways["block by block"] += "blockwise.compress(model, tokens, lambda block, at: gptq.quantize_model(block, at, 4))"
growth = {way: resident_growth(imports, code) for way, code in ways.items()}

# %% [markdown]
# Block by block it stays below two and a half times the checkpoint. What GPTQ's Hessians take, about 55 bytes times
# the square of the feed-forward width, is in it: little for a model of many blocks, and more than all else for a wide
# one of few. SmoothQuant and 2:4 need no such matrix.

# %%
drawn, axes = figure(height=1.8)
times = {way: (bytes_ or 0) / on_disk for way, bytes_ in growth.items()}
axes.barh(list(times), list(times.values()), color=[COLOURS["baseline"], COLOURS["method"]])
axes.axvline(2.5, color=COLOURS["reference"], linestyle="--", label="2.5")
axes.set(xlabel="peak memory, times the checkpoint's size")
legend(axes)
assert times["block by block"] < 2.5
drawn

# %% [markdown]
# What is left to do is to remove the folders that this notebook has written.

# %%
shutil.rmtree(temporary)
