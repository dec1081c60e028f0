"""Linear layers that train a subset of their weights: gradient and optimizer state exist for that subset only.

Two nested sets of flat places: B, whose weights are trained, and A within B, whose weights are multiplied by. Which
they are is a chapter's business; it gives the function that chooses, and the one that updates.

What is kept between and during the passes of a step, of b weights in B and float32: values 4 b, gradient 4 b, moments
8 b, places and membership 5 b; and the dense θ, 4 bytes for each weight, which only choosing reads. What is temporary:
each pass expands one layer's weight for its one product, and the gradient is computed in tiles of `TILE_ROWS` rows of
the weight, of which B is kept. So the multiplications are those of a dense layer; `gathered` would do fewer, but it
reads two numbers for each, and took ten times as long on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitfm import surgery
from minitfm.model import Transformer

TILE_ROWS = 32  # rows of a weight whose gradient is there at once

Choose = Callable[[Tensor, int, int], Tensor]  # theta [out, in], |A|, |B| -> member [out, in]: 2 in A, 1 in B only, 0
Update = Callable[["SubsetLinear", dict[str, Any], float, float], None]  # layer, its state, rate, decay; in place


def expanded(values: Tensor, index: Tensor, active: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight `[out, in]` that is multiplied by: values `[b]` where they are active, 0 elsewhere."""
    weight = values.new_zeros(shape[0] * shape[1])
    weight[index] = values.where(active, 0)
    return weight.view(shape)


class SubsetProduct(torch.autograd.Function):
    """x `[tokens, in]` times the weight on A, transposed; backward, the gradient of all of B, and none of the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Tensor, active: Tensor, layer: SubsetLinear) -> Tensor:
        ctx.save_for_backward(x, values, index, active)
        ctx.shape, ctx.bounds = tuple(layer.theta.shape), layer.bounds
        return x @ expanded(values, index, active, ctx.shape).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, index, active = ctx.saved_tensors
        grad_out, found = grads[0], torch.empty_like(values)
        grad_x = grad_out @ expanded(values, index, active, ctx.shape) if ctx.needs_input_grad[0] else None
        for tile, (low, high) in enumerate(pairwise(ctx.bounds)):
            first = tile * TILE_ROWS
            dense = grad_out[:, first : first + TILE_ROWS].t() @ x
            found[low:high] = dense.flatten()[index[low:high] - first * x.shape[1]]
        return grad_x, found, None, None, None


class SubsetLinear(nn.Module):
    """A linear layer of which `values`, the weights of B, are trained: x `[.., in]` -> `[.., out]`.

    theta `[out, in]` is the dense buffer: up to date outside B, and everywhere right after `refresh`. index int32 `[b]`
    are the flat places of B, ascending, active bool `[b]` says which of them are in A, whose size `kept` stays.
    """

    def __init__(self, linear: nn.Linear, forward: int, backward: int, choose: Choose) -> None:
        super().__init__()
        self.theta, self.bias, self.choose = nn.Buffer(linear.weight.detach().clone()), linear.bias, choose
        self.kept, self.density = forward, forward / self.theta.numel()
        self.values = nn.Parameter(self.theta.new_empty(0))
        self.index = nn.Buffer(torch.empty(0, dtype=torch.int32, device=self.theta.device))
        self.active = nn.Buffer(torch.empty(0, dtype=torch.bool, device=self.theta.device))
        self.bounds: list[int] = []
        self.refresh(backward)

    @torch.no_grad()
    def refresh(self, backward: int) -> tuple[Tensor, Tensor]:
        """Write B into θ and choose anew, B of `backward` weights; drops the gradient.

        Returns (place, stays), both `[b']`: where each weight of the new B stood in the old one, and whether it did; a
        place without meaning is at most the old b.
        """
        old, (rows, columns) = self.index, self.theta.shape
        flat = self.theta.view(-1)
        flat[old] = self.values
        member = self.choose(self.theta, self.kept, backward).view(-1)
        self.index = member.nonzero()[:, 0].int()
        self.active = member[self.index] == 2
        edges = torch.arange(0, rows + TILE_ROWS, TILE_ROWS, device=old.device).clamp(max=rows) * columns
        self.bounds = torch.searchsorted(self.index, edges.int()).tolist()
        self.values.data, self.values.grad = flat[self.index], None
        place = torch.searchsorted(old, self.index)
        return place, F.pad(old, (0, 1), value=-1)[place] == self.index

    def weight(self) -> Tensor:
        """The weight `[out, in]` that it multiplies by, 0 outside A."""
        return expanded(self.values, self.index, self.active, self.theta.shape)

    def forward(self, x: Tensor) -> Tensor:
        rows: Any = SubsetProduct.apply(x.flatten(0, -2), self.values, self.index, self.active, self)
        out = rows.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


class SubsetOptimizer(torch.optim.Optimizer):
    """`update` on the values of `SubsetLinear` layers. Its state, mean and square, is held for B, and follows it."""

    def __init__(self, layers: list[SubsetLinear], update: Update, rate: float, decay: float) -> None:
        self.layers, self.update = layers, update
        super().__init__([layer.values for layer in layers], {"lr": rate, "peak": rate, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of all layers. ValueError for a layer that took no part in the loss."""
        rate, decay = (self.param_groups[0][name] for name in ("lr", "decay"))
        for layer in self.layers:
            if layer.values.grad is None:
                raise ValueError("a layer took no part in the loss: its weights have no gradient")
            state = self.state[layer.values]
            if not state:
                dtype = torch.promote_types(layer.values.dtype, torch.float32)
                mean, square = (torch.zeros_like(layer.values, dtype=dtype) for _ in range(2))
                state |= {"step": 0, "mean": mean, "square": square}
            state["step"] += 1
            self.update(layer, state, rate, decay)

    @torch.no_grad()
    def refresh(self, backward: dict[SubsetLinear, int]) -> float:
        """Choose all sets anew, B of so many weights; returns the share of A that is new in it.

        A weight that stays in B keeps its moments, a new one starts with 0.
        """
        entered = 0
        for layer, count in backward.items():
            before, state = layer.active, self.state[layer.values]
            place, stays = layer.refresh(count)
            entered += int((layer.active & ~(stays & F.pad(before, (0, 1))[place])).sum())
            for name in ("mean", "square"):
                state[name] = F.pad(state[name], (0, 1))[place].where(stays, 0)
        return entered / sum(layer.kept for layer in backward)


def gathered(x: Tensor, grad_out: Tensor, index: Tensor) -> Tensor:
    """The same gradient of B by its definition, Σ_t grad_out[t, row] x[t, column]: `[b]`, a gathered product."""
    row, column = index // x.shape[1], index % x.shape[1]
    return (grad_out[:, row] * x[:, column]).sum(0)


@torch.no_grad()
def settle(model: Transformer) -> None:
    """Plain linear layers again, in place, which hold the weights of A."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SubsetLinear):
            weight = layer.weight()
            plain = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight), layer.bias
            surgery.replace(model, name, plain)


def kept_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of gradients and optimizer state that are held for the linear layers of the blocks, after a step."""
    weights = {id(weight): weight for name, weight in model.named_parameters() if is_block_weight(name)}
    gradients = sum(weight.grad.nbytes for weight in weights.values() if weight.grad is not None)
    states = [state for weight, state in optimizer.state.items() if id(weight) in weights]
    numbers = [value for state in states for value in state.values() if torch.is_tensor(value) and value.dim()]
    return gradients + sum(number.nbytes for number in numbers)


def is_block_weight(name: str) -> bool:
    """Whether a parameter of that name is a weight of a block's linear layer, dense or in part."""
    return name.startswith("blocks.") and name.split(".")[-2].endswith("_proj")
