# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Quantized KV cache: keys by channel, values by token
#
# A decoder remembers a key and a value for every token that it has read, in every layer. With long texts and many
# readers at once, this memory outgrows the model itself, and each new token reads all of it. So we hold it in 4 bits,
# or 2. The one question is which numbers should share a scale, and the answer is not the same for keys and values.

# %%
import numpy as np
import torch

from chapters import workbook
from chapters.explore import explore
from chapters.figures import COLOURS, figure, heatmap, legend, panels, series
from chapters.lab import Lab
from chapters.quantization import kv_cache
from chapters.shared.quantized_cache import KIVI_KEYS, Plan, QuantizedCache
from kernels import bench, check, hardware
from kernels.quantization import kv_cache as kernel
from minitfm.cache import KVCache

torch.set_num_threads(1)  # so small a model is fastest on one
lab = Lab()

# %% [markdown]
# ## What hurts
#
# Llama-3-8B keeps 32 layers · 8 heads · 128 channels, for keys and for values, in 16 bits: 131 kB for each token of
# each text. Its weights take 16 GB. Here is where the cache overtakes them, and where codes of 4 or 2 bits leave it:
# with their groups' steps and minima 5 and 3 bits for each number, as we shall see.

# %%
thousands = np.array([0, 250])
drawn, axes = figure(height=2.8)
for bits, role in ((16, "baseline"), (5, "method"), (3, "second")):
    gigabytes = 32 * 8 * 128 * 2 * bits / 8 * thousands / 1e6
    axes.plot(thousands, gigabytes, **series(role) | {"marker": ""}, label=f"cache, {bits} bits a number")
axes.axhline(16, **series("reference"), label="weights")
axes.set(xlabel="thousands of tokens held, all texts together", ylabel="GB", title="the cache outgrows the model")
axes.set_ylim(0, 50)
legend(axes, ncols=2, loc="upper left")
drawn

# %% [markdown]
# ## A look at what is held
#
# These are the keys and values of one head of our model for one text: 48 tokens down, 32 channels across. What is the
# difference between the two?

# %%
model, text = lab.model(), lab.validation[:1, :48]
cache = KVCache(lab.config, 1, 48)
with torch.no_grad():
    model(text, cache)
keys, values = (half[1, 0, 1, :, :].numpy() for half in (cache.k, cache.v))
drawn, axes = panels(2, width=9.0, height=2.8)
for axis, numbers, words in zip(axes, (keys, values), ("keys", "values"), strict=True):
    heatmap(axis, numbers, "number held")
    axis.set(xlabel="channel", ylabel="token", title=words)
drawn

# %% [markdown]
# ## One group, one step
#
# The keys have stripes: some channels are large, and they are so for every token. The values look more like noise.
#
# A group of numbers shares its smallest value and a step; each number becomes how many steps it lies above. With 2 bits
# there are four levels. A group along a token has the stripes in it: they make its step wide, and all other channels
# must do with that. A group along a channel has a stripe to itself, or none. Here are the steps of 32 groups of either
# kind, for the same 32 tokens, from the finest to the widest.

# %%
drawn, axes = figure(height=2.4)
for per, role in (("token", "baseline"), ("channel", "method")):
    codes, grid = kv_cache.quantize(keys[:32], 2, 32, per, "kivi")
    axes.plot(np.sort(grid[..., 0].ravel()), **series(role) | {"marker": ""}, label=f"groups per {per}")
axes.set(xlabel="group, sorted by its step", ylabel="step", title="keys: finer steps along channels")
axes.set_ylim(bottom=0)
legend(axes)
drawn

# %% [markdown]
# No number moves further than half of its step, whichever way the groups lie: that is what rounding to the nearest
# promises. So it is the steps that decide.

# %%
errors = {}
for per in ("token", "channel"):
    codes, grid = kv_cache.quantize(keys[:32], 2, 32, per, "kivi")
    found = kv_cache.dequantize(codes, grid, 32, per)
    steps = np.repeat(grid[..., 0], 32, -1 if per == "token" else -2)
    assert (np.abs(found - keys[:32]) <= steps / 2 + 1e-5).all()
    errors[per] = float(np.mean((found - keys[:32]) ** 2))
assert errors["channel"] < errors["token"]
print({per: round(error, 3) for per, error in errors.items()})

# %% [markdown]
# Here is that error, number by number, for the keys. Where the notebook is live, look at the values, too, and at 4
# bits.


# %%
def error_maps(held="keys", bits=2):
    numbers = (keys if held == "keys" else values)[:32]
    lost = []
    for per in ("token", "channel"):
        lost.append(np.abs(kv_cache.dequantize(*kv_cache.quantize(numbers, bits, 32, per, "kivi"), 32, per) - numbers))
    drawn, axes = panels(2, width=9.0, height=2.8)
    for axis, error, per in zip(axes, lost, ("token", "channel"), strict=True):
        heatmap(axis, error, "|error|", limit=float(np.max(lost)))
        axis.set(xlabel="channel", ylabel="token", title=f"{held}, groups per {per}: mean {error.mean():.2f}")
    return drawn


# %% [markdown]
# On the left whole rows are bright: a token with one number far out has a coarse step in all channels. On the right
# columns are: a channel with a number far out keeps its coarse step to itself. A stripe, large but nearly the same for
# all tokens, costs its own group little.

# %%
explore(error_maps, held=["keys", "values"], bits=[2, 4])

# %% [markdown]
# ## Bytes
#
# `pack` puts four codes of 2 bits, or two of 4 bits, into a byte, the first in its highest bits. For a group of 32, a
# 16-bit step and a 16-bit minimum add one bit to each number.

# %%
codes, grid = kv_cache.quantize(values, 2, 32, "token", "kivi")
packed = kv_cache.pack(codes, 2)
first = [int(packed[0, 0]) >> place & 3 for place in (6, 4, 2, 0)]
assert first == codes[0, :4].tolist()
assert 8 * (packed.nbytes + 2 * grid.size) / codes.size == 3

# %% [markdown]
# ## A cache that waits
#
# Groups along a channel need 32 tokens, and a new token is one. So the newest positions wait in full precision until
# they fill a block. `QuantizedCache` does that behind minitfm's `cache` seam. Here are the bytes that it holds, as
# tokens come one at a time. What will the line look like?

# %%
plans = Plan("channel", 2, 32, 32, "kivi"), Plan("token", 2, 32, 0, "kivi")
cache, held = QuantizedCache(lab.config, *plans, capacity=128), []
with torch.no_grad():
    for token in lab.validation[0]:
        model(token.view(1, 1), cache)
        held.append(cache.nbytes())

# %% [markdown]
# Saw teeth: keys wait in full precision until 32 tokens fill a group, and then shrink at once. (Values do not wait;
# their groups lie within a token.)

# %%
drawn, axes = figure(height=2.6)
axes.plot(np.arange(1, 129), np.array(held) / 1e3, **series("method") | {"marker": ""}, label="2 bits")
axes.plot(np.arange(1, 129), np.arange(1, 129) * 2.048, **series("baseline") | {"marker": ""}, label="16 bits")
axes.set(xlabel="tokens read", ylabel="kilobytes held")
legend(axes)
drawn

# %% [markdown]
# At the end of a block everything is in 2 bits, and three bits a number are what is left. KIVI's own window is longer:
# 128 keys and 128 values.

# %%
per_token = 2 * lab.config.layers * lab.config.kv_heads * lab.config.head_dim
assert held[127] == 128 * per_token * 3 / 8 and KIVI_KEYS.residual == 128

# %% [markdown]
# ## What it costs the model
#
# The claim reads three quarters of each text into a cache, and asks how well the model then predicts the rest. It tries
# 4 bits in FlexGen's way, and 2 bits with groups along each of the two directions. Which of the four will win, and is
# it the keys or the values that decide?

# %%
claim = kv_cache.claim(lab)
print(claim.sentence)
claim.figure

# %% [markdown]
# Keys want groups along a channel, as the papers say: natural keys, nothing planted. For values, KIVI found that groups
# along a channel ruin a large model; on one as small as ours, both directions cost about the same.

# %%
assert claim.holds
nbytes = {name: value for name, value in claim.numbers.items() if name.startswith("bytes")}
assert list(nbytes.values()) == [16 * per_token / 8, 5 * per_token / 8, 3 * per_token / 8]

# %% [markdown]
# ## The kernel, in bytes
#
# Attention for one new token does two operations with each number that it reads, so its time is the time of reading.
# The kernel reads codes and makes numbers of them on chip. The naive way writes the expanded cache and reads it again:
# more bytes than if nothing had been quantized. Here for 16 texts of 8192 tokens in a layer of Llama-3-8B, in 4 bits:

# %%
case = kernel.CASES[1]
numbers, gpu = 2 * 16 * 8 * 8192 * 128, hardware.GPUS["H200"]
moved = {"expand, then attend": case.bytes + 4 * numbers, "16-bit cache": 2 * numbers, "codes, fused": case.bytes}
drawn, axes = figure(height=2.2)
axes.barh(list(moved), [1e6 * size / gpu.bandwidth for size in moved.values()], color=COLOURS["method"])
axes.set(xlabel="least time on an H200, µs", title="codes help only if they are never expanded in memory")
assert 3 < moved["16-bit cache"] / moved["codes, fused"] < 3.3
drawn

# %% [markdown]
# All query heads that share a key/value head are rows of one product, so that no code is unpacked twice; positions
# are shared out among programs, and `combine_kernel` adds what they found. What the compiler makes of it for an H100
# or H200 can be seen without one:

# %%
report = check.static_report("quantization.kv_cache", [90])
for row in report:
    print(f"{row['case']:42} {row['kernel']:15} {row['registers']:3} registers, {row['load_bits']}-bit loads, "
          f"{row['spill_bytes']} bytes spilled")  # fmt: skip
assert not any(row["failures"] for row in report)

# %% [markdown]
# And timed on a GPU, beside torch's own attention on a 16-bit cache:

# %%
for row in bench.recorded("quantization.kv_cache"):
    peers = ", ".join(f"{peer} {time:.1f} µs" for peer, time in row.get("peers_us", {}).items())
    print(f"{row['gpu']}, {row['case']}: {row.get('median_us', float('nan')):.1f} µs; {peers}")
if not bench.recorded("quantization.kv_cache"):
    print("not recorded yet: python -m kernels bench quantization.kv_cache, on a machine with a GPU")

# %% [markdown]
# ## Your turn
#
# The tests say what is left to you: the codes by either paper's rule, packing, attention over codes, and the kernel.
#
# ```
# python -m chapters exercise kv_cache --to my
# python -m pytest --submission my tests/quantization/test_kv_cache.py
# ```

# %%
for exercise in workbook.choose(workbook.exercises(), ["kv_cache"]):
    print(f"{exercise.points} points  {exercise.function}")
assert len(workbook.choose(workbook.exercises(), ["kv_cache"])) == 4
