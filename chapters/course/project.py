"""Final project: the base model in 3.5 bits per parameter, with the lowest perplexity that you can reach.

    parts = compress(model, tokens)            # yours: whatever the book teaches, or better
    small = restore(parts, model.config)       # the book's: a model that knows nothing but the parts
    score = perplexity of `small`, if stored_bits(parts) ≤ 3.5 · parameters

Everything counts: embedding, norms, scales, zero points. What is cheap to say costs little: a matrix may be stored as
codes on grids, as 16-bit floats, and either of them without its zeros. `compress` passes if it keeps the limit and
beats rounding to nearest at 3 bits; the leaderboard ranks by perplexity. Its text is not what `tokens` were drawn from.

Saves    nine tenths of the bytes of float32: 0.5 MB instead of 4.5.
Costs    what the leaderboard shows.
Follows  the storage of chapters/quantization/weight_only.py (16-bit scales, zero points of as many bits as codes) and
         of chapters/shared/pruned_layers.py (a bitmap and the values that are not zero).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from chapters.quantization.gptq import quantize_model
from chapters.quantization.weight_only import Quantized, nearest_codes
from minitfm import checkpoint
from minitfm.config import Config
from minitfm.model import Transformer

LIMIT = 3.5  # bits per parameter
Part = Quantized | np.ndarray  # a matrix on grids, or floats of any shape


def stored_bits(parts: Mapping[str, Part]) -> int:
    """What `parts` take: each in the cheaper of two forms, with its zeros or with a bitmap of one bit a value.

    Floats take 16 bits each. Codes take `bits` each, and every group 16 bits for its scale and `bits` for its zero
    point; a code that equals its zero point is a zero. ValueError as `require_storable`.
    """
    total = 0
    for name, part in parts.items():
        require_storable(name, part)
        values = part.codes if isinstance(part, Quantized) else part
        each = part.bits if isinstance(part, Quantized) else 16
        grids = (16 + part.bits) * part.scale.size if isinstance(part, Quantized) else 0
        nonzero = np.count_nonzero(restored(part))
        total += min(each * values.size, values.size + each * nonzero) + grids
    return int(total)


def require_storable(name: str, part: Part) -> None:
    """Raise ValueError unless `part` is finite floats, or codes that fit their bits in groups of neighbours."""
    if isinstance(part, np.ndarray):
        if not np.isfinite(restored(part)).all():
            raise ValueError(f"{name} must be finite in float16")
        return
    if not isinstance(part, Quantized) or isinstance(part.bits, bool) or part.bits not in range(1, 9):
        raise ValueError(f"{name} must be an array or Quantized with 1 to 8 bits, got {type(part).__name__}")
    groups, columns = part.scale.shape[1], part.codes.shape[1]
    if part.codes.dtype != np.uint8 or part.codes.max() >= 2**part.bits:
        raise ValueError(f"{name} must have uint8 codes below {2**part.bits}, got {part.codes.dtype}")
    if part.zero.shape != part.scale.shape or len(part.scale) != len(part.codes) or columns % groups:
        raise ValueError(f"{name} must have a scale and a zero point for each row of each group")
    if not np.array_equal(part.zero, part.zero.astype(np.uint8) & (2**part.bits - 1)):
        raise ValueError(f"{name} must have integer zero points from 0 to {2**part.bits - 1}")
    if not np.array_equal(part.group_of_column, np.arange(columns) // (columns // groups)):
        raise ValueError(f"{name} must have groups of neighbouring columns: another order would have to be stored")
    if not (np.abs(part.scale) <= np.finfo(np.float16).max).all():
        raise ValueError(f"{name} must have scales that are finite in float16")


def restored(part: Part) -> np.ndarray:
    """The values that a part stands for, float32; scales and floats are rounded to float16 first."""
    if isinstance(part, np.ndarray):
        with np.errstate(over="ignore"):
            return part.astype(np.float16).astype(np.float32)
    scale = part.scale.astype(np.float16).astype(np.float64)[:, part.group_of_column]
    return (scale * (part.codes.astype(np.float64) - part.zero[:, part.group_of_column])).astype(np.float32)


def restore(parts: Mapping[str, Part], config: Config) -> Transformer:
    """The model that the parts hold, in evaluation mode. ValueError for missing, unknown or ill shaped parts."""
    model = Transformer(config)
    checkpoint.fill(model, {name: torch.from_numpy(restored(part)) for name, part in parts.items()})
    return model.eval()


def baseline(model: Transformer) -> dict[str, Part]:
    """What there is to beat: every matrix rounded to the nearest of 3 bits in groups of 64; norms in 16 bits."""
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in checkpoint.stored(model).items()}
    return {name: nearest_codes(tensor, 64, 3) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


def compress(model: Transformer, tokens: Tensor) -> dict[str, Part]:
    """All of `model` in at most LIMIT bits per parameter: a `Part` for each name of `checkpoint.stored(model)`.

    model   the book's base model, in evaluation mode, on the CPU; may be changed
    tokens  int64 `[64, 128]`, calibration text

    A matrix is a `Quantized` (1 to 8 bits, groups of neighbouring columns, scales that are rounded to float16, integer
    zero points that fit the bits) or floats, which are rounded to float16; a vector is floats. `stored_bits` says
    what that costs. `restore` must give a model of lower perplexity than `restore(baseline(model), model.config)`.
    At most two minutes on one core. Nothing may be read from a file: the parts come from `model` and `tokens`.
    """
    norms = {name: tensor for name, tensor in checkpoint.stored(model).items() if tensor.ndim == 1}
    embedding = model.embedding.weight.detach().cpu().numpy()
    codes = quantize_model(model, tokens, bits=3, act_order=False)
    parts: dict[str, Part] = {f"{name}.weight": layer for name, layer in codes.items()}
    parts |= {name: tensor.detach().cpu().numpy() for name, tensor in norms.items()}
    return parts | {"embedding.weight": nearest_codes(embedding, None, 4)}
