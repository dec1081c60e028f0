"""What the pruning chapters share: exact counts, masks that training keeps, and layers that store no zeros.

A mask is bool `[out, in]`, True where a weight is KEPT; `Masks` holds one for each linear layer of the blocks, by name.

A sparse layer is a bitmap, one bit for each weight, and the values that are not zero, row by row. In b bits a value, a
weight costs 1 + b · kept / all bits: less than dense from 1/b zeros on (about 3% in 32 bits, 6% in 16), and less than
an index for each value as long as an index takes more than all / kept bits. It saves memory; the product is dense.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitfm import checkpoint, surgery, train
from minitfm.checkpoint import Checkpoint
from minitfm.model import Transformer

Masks = dict[str, Tensor]
Rule = Callable[[np.ndarray], np.ndarray]  # weight [out, in] -> bool mask [out, in], True where a weight is kept


def checked_sparsity(sparsity: float) -> float:
    """`sparsity`, the share of zeros, as it is. Raises ValueError unless 0 <= sparsity < 1 (so NaN is refused, too)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    return sparsity


def dropped(size: int, sparsity: float) -> int:
    """How many of `size` weights go: round(sparsity · size), Python's round, halves to even; but one always stays.

    Published codes drop one more or fewer, see chapters/pruning/magnitude.py. ValueError as `checked_sparsity`, and for
    size < 1.
    """
    if size < 1:
        raise ValueError(f"there must be a weight to prune, got size={size}")
    return min(round(checked_sparsity(sparsity) * size), size - 1)


def magnitudes(weight: np.ndarray) -> np.ndarray:
    """|weight| as float64, any shape, exact also for int8, which has no +128. ValueError if empty or not finite."""
    if weight.size == 0:
        raise ValueError(f"weight must not be empty, got shape {weight.shape}")
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite, it holds NaN or infinity")
    return np.abs(weight.astype(np.float64))


def prune_each(model: Transformer, rule: Rule) -> Masks:
    """Zero what `rule` does not keep in every linear layer of the blocks, in place; returns the masks."""
    layers = surgery.linears(model).items()
    masks = {name: torch.from_numpy(rule(layer.weight.double().numpy(force=True))) for name, layer in layers}
    apply_masks(model, masks)
    return masks


@torch.no_grad()
def apply_masks(model: Transformer, masks: Masks) -> None:
    """Zero (+0) the weights that are not kept, in place. A NaN that is not kept is gone, too."""
    for name, mask in masks.items():
        weight = model.get_parameter(f"{name}.weight")
        weight.masked_fill_(~mask.to(weight.device), 0)


def nonzero_masks(model: Transformer) -> Masks:
    """The masks of a model that is pruned already: True where a weight of a block's linear layer is not 0."""
    return {name: layer.weight.detach() != 0 for name, layer in surgery.linears(model).items()}


def count_kept(masks: Masks) -> tuple[int, int]:
    """(weights kept, all weights) of the masked layers, exact."""
    return sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())


def train_masked(
    model: Transformer, masks: Masks, stream: Tensor, settings: train.Settings,
    loss: train.Loss | None = None, after_step: Callable[[int, Transformer], None] | None = None,
    validation: Tensor | None = None,
) -> train.History:  # fmt: skip
    """`train.train`, dropped weights staying 0: their gradients are 0, and after each step they are put back to 0.

    The first keeps them out of the moments of the optimizer and of the norm that is clipped, the second undoes what
    Muon does and what is left in the moments of a weight that was trained before it was dropped. `after_step` sees them
    put back, and may put other masks into the same dict: gradual pruning.
    """

    def put_back(step: int, model: Transformer) -> None:
        apply_masks(model, masks)
        if after_step is not None:
            after_step(step, model)
            apply_masks(model, masks)

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(~masks[name].to(gradient.device), 0)

    apply_masks(model, masks)
    weights = {name: model.get_parameter(f"{name}.weight") for name in masks}
    hooks = [weight.register_hook(hook(name)) for name, weight in weights.items() if weight.requires_grad]
    try:
        return train.train(model, stream, settings, loss, put_back, validation=validation)
    finally:
        for each in hooks:
            each.remove()


class SparseLinear(nn.Module):
    """A linear layer that holds a bitmap and its weight's non-zeros: x `[.., in]` -> x Wᵀ + bias `[.., out]`.

    For inference: the weight is expanded for each call and not trained. bitmap uint8 `[out, ⌈in / 8⌉]`, of which bit j
    of byte b (the lowest is bit 0) is column 8 b + j, bits past the last column are 0; values `[kept]`, row by row.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Zeros of either sign become +0, all else stays as it is. Raises ValueError for NaN and infinity."""
        super().__init__()
        weight = linear.weight.detach()
        if not weight.isfinite().all():
            raise ValueError("weight must be finite, it holds NaN or infinity")
        self.in_features, mask = linear.in_features, weight != 0
        octets = F.pad(mask, (0, -linear.in_features % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
        places = 1 << torch.arange(8, dtype=torch.uint8, device=weight.device)
        self.bitmap = nn.Buffer((octets * places).sum(-1, dtype=torch.uint8))
        self.values = nn.Buffer(weight[mask])
        self.bias = linear.bias

    def weight(self) -> Tensor:
        """The expanded weight `[out, in]`."""
        places = torch.arange(8, dtype=torch.uint8, device=self.bitmap.device)
        mask = (self.bitmap[..., None] >> places & 1).bool().flatten(1)[:, : self.in_features]
        return self.values.new_zeros(mask.shape).masked_scatter(mask, self.values)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


def use_sparse(model: Transformer) -> Transformer:
    """Put a `SparseLinear` in the place of every linear layer of the blocks, in place; returns the same model."""
    for name, layer in surgery.linears(model).items():
        surgery.replace(model, name, SparseLinear(layer))
    return model


def place_sparse(model: Transformer, tensors: dict[str, Tensor]) -> None:
    """`prepare` of a sparse checkpoint: makes the layers that tensors fill. ValueError if these cannot be theirs."""
    for name, layer in surgery.linears(model).items():
        bitmap, values = (tensors.get(f"{name}.{part}") for part in ("bitmap", "values"))
        if bitmap is None or values is None:
            continue
        rows, columns = layer.weight.shape
        if bitmap.dtype != torch.uint8 or bitmap.shape != (rows, -(-columns // 8)):
            raise ValueError(f"{name}.bitmap must be uint8 [{rows}, {-(-columns // 8)}], got {bitmap.dtype} "
                             f"{[*bitmap.shape]}")  # fmt: skip
        bits = np.unpackbits(bitmap.numpy(), axis=1, bitorder="little")
        if bits[:, columns:].any() or values.shape != (bits.sum(),) or not values.is_floating_point():
            raise ValueError(f"{name}: values {values.dtype} {[*values.shape]} do not fit a bitmap of {bits.sum()} "
                             f"bits in {columns} columns")  # fmt: skip
        layer.weight = nn.Parameter(torch.from_numpy(bits[:, :columns].copy()).to(values.dtype))
        surgery.replace(model, name, SparseLinear(layer))


def load_sparse(folder: Path | str) -> Checkpoint:
    """A checkpoint with sparse layers, as `checkpoint.save` writes it after `use_sparse`; errors as there."""
    return checkpoint.load(folder, prepare=place_sparse)


def stored_bits(layers: Iterable[nn.Module]) -> float:
    """Bits per weight, counted in the buffers that the `SparseLinear` among `layers` hold."""
    sparse = [layer for layer in layers if isinstance(layer, SparseLinear)]
    held = sum(layer.bitmap.nbytes + layer.values.nbytes for layer in sparse)
    return 8 * held / sum(len(layer.bitmap) * layer.in_features for layer in sparse)


def pattern(text: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4): of every 4 neighbours 2 are KEPT (some codes count the zeros). For argparse."""
    kept, colon, group = text.partition(":")
    if not (colon and kept.isdecimal() and group.isdecimal() and 1 <= int(kept) < int(group)):
        raise argparse.ArgumentTypeError(f"{text!r} is not N:M, N kept of M neighbours, 1 <= N < M, such as 2:4")
    return int(kept), int(group)


def add_options(parser: argparse._ActionsContainer, patterns: bool = False) -> None:
    """--sparsity and --packed, for all that prune weights; with `patterns` also --pattern N:M."""
    parser.add_argument("--sparsity", type=float, default=0.5, metavar="S", help="share of zeros (default 0.5)")
    if patterns:
        parser.add_argument("--pattern", type=pattern, metavar="N:M", help="keep N of every M neighbours instead")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="save bitmaps and values, for `load_sparse`")


def report(model: Transformer, args: argparse.Namespace, technique: str) -> dict[str, float | str]:
    """What `apply` returns of a pruned model, counted in its weights; with --packed it is also saved sparse."""
    kept, weights = count_kept(nonzero_masks(model))
    sparse = use_sparse(copy.deepcopy(model))
    found: dict[str, float | str] = {"bits per weight": stored_bits(sparse.modules())}
    found |= {"kept weights": f"{kept} of {weights}", "zeros": f"{1 - kept / weights:.4%}"}
    if args.packed:
        tokenizer = checkpoint.load(args.model or checkpoint.BASE).tokenizer
        checkpoint.save(args.packed, sparse, tokenizer, {"technique": technique})
        found["packed checkpoint, MB"] = (args.packed / "model.safetensors").stat().st_size / 1e6
    return found
