"""Operands of a masked step, and what each function of rewinding refuses."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.adamw import adamw

SIZES = st.sampled_from([(1,), (7,), (8,), (33,), (4, 16), (5, 13), (2, 3, 11)])


def drawn_step(shape: tuple[int, ...], seed: int, of: str = "float64") -> tuple[np.ndarray, ...]:
    """weight, gradient, mask, mean, square in float64, with values of dtype `of`.

    Dropped numbers have gradients that are NaN or infinite, and weights and moments as if they had just been dropped.
    """
    generator = np.random.default_rng(seed)
    weight, gradient, mean, root = generator.normal(size=(4, *shape)).astype(of).astype(np.float64)
    mask = generator.random(shape) < 0.5
    mask.flat[-1] = True
    gradient[~mask] = generator.choice([np.nan, np.inf, 1.0], size=shape)[~mask]
    gradient[mask & (generator.random(shape) < 0.1)] = 0
    return weight, gradient, mask, mean, root**2


def packed(mask: Tensor) -> Tensor:
    """A bitmap by NumPy: uint8, bit j of byte b is number 8 b + j."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().ravel(), bitorder="little")).to(mask.device)


def torchs_step(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, rate: float,
    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """Step number `step` of `torch.optim.AdamW`, its state handed in; weight and moments are written in place."""
    how = {"lr": rate, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    steps = [torch.tensor(step - 1.0)]
    adamw([weight], [gradient], [mean], [square], [], steps, foreach=False, amsgrad=False, maximize=False, **how)


def step_with(place: int, array: np.ndarray) -> tuple:
    """Arguments of `masked_adamw`, one of its arrays replaced."""
    arrays = [np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3), dtype=bool), np.zeros((2, 3)), np.zeros((2, 3))]
    arrays[place] = array
    return (*arrays, 1, 0.1)


ONES, ALL, RATES = np.ones((2, 3)), np.ones((2, 3), dtype=bool), np.array([3.0, 2.0, 1.0])
FINE = step_with(0, ONES)
HALF = ALL & [[True], [False]]
NAN, INFINITE = np.full((2, 3), np.nan), np.full((2, 3), np.inf)

# {function: {a pattern of words in the book's error: its type, the arguments, the keyword arguments}}
REFUSED: dict[str, dict[str, tuple[type[Exception], tuple, dict]]] = {
    "kept_counts": {
        "weight to prune, got size=0": (ValueError, (0, 0.2, 3), {}),
        r"\[0, 1\), got 1$": (ValueError, (5, 1, 3), {}),
        r"\[0, 1\), got -0.2": (ValueError, (5, -0.2, 3), {}),
        r"\[0, 1\), got nan": (ValueError, (5, np.nan, 0), {}),
        r"\[0, 1\), got 1.5": (ValueError, (5, 1.5, 3), {"open_lth": True}),
        "levels must not be negative, got -1": (ValueError, (5, 0.2, -1), {}),
    },
    "retraining_rates": {
        "method must be one of lottery, weight, lr, fine-tuning, got 'late'": (ValueError, ("late", RATES, 1), {}),
        "replayed must be from 1 to the 3 steps of the first run, got 0": (ValueError, ("weight", RATES, 0), {}),
        "replayed must be .* got 4": (ValueError, ("fine-tuning", RATES, 4), {}),
        "replayed must be .* got -1": (ValueError, ("lr", RATES, -1), {}),
        "replayed must be from 1 to the 3 steps .* got 4": (ValueError, ("lottery", RATES, 4), {}),
        r"rates must be \[T\].*\(0,\)": (ValueError, ("lottery", RATES[:0], 1), {}),
        r"rates must be \[T\].*\(1, 3\)": (ValueError, ("lr", RATES[None], 1), {}),
        "finite.*nan": (ValueError, ("lr", RATES * np.nan, 1), {}),
        "positive.*-2": (ValueError, ("lottery", -RATES, 1), {}),
        "positive.*inf": (ValueError, ("weight", RATES * np.inf, 1), {}),
        "positive.*0": (ValueError, ("weight", RATES - 1, 1), {}),
        "constant must be positive and finite, got 0": (ValueError, ("fine-tuning", RATES, 1, 0.0), {}),
        "constant must be positive and finite, got -1": (ValueError, ("fine-tuning", RATES, 1, -1.0), {}),
        "constant must be positive and finite, got nan": (ValueError, ("fine-tuning", RATES, 1, np.nan), {}),
        "constant must be positive and finite, got inf": (ValueError, ("fine-tuning", RATES, 1, np.inf), {}),
    },
    "next_masks": {
        "masks must be shaped like weights.*got \\[\\]": (ValueError, ([ONES], [], 1), {}),
        r"shaped like weights, \[\]": (ValueError, ([], [], 1), {}),
        r"shaped like weights.*\(3, 2\)": (ValueError, ([ONES], [ALL.T], 1), {}),
        "masks must be bool, got float64": (TypeError, ([ONES], [ONES], 1), {}),
        "kept must be from 1 to the 6 weights that are left, got 0": (ValueError, ([ONES], [ALL], 0), {}),
        "1 to the 6 .*got 7": (ValueError, ([ONES], [ALL], 7), {}),
        "1 to the 3 .*got 4": (ValueError, ([ONES], [HALF], 4), {}),
        "holds NaN": (ValueError, ([ONES, NAN], [ALL, ALL], 2), {}),
        "or infinity": (ValueError, ([INFINITE], [ALL], 2), {}),
        "weight must be finite.*NaN": (ValueError, ([np.where(HALF, 1, np.nan)], [HALF], 2), {}),
        r"weight .*\(0, 3\)": (ValueError, ([ONES, ONES[:0]], [ALL, ALL[:0]], 2), {}),
    },
    "masked_adamw": {
        r"one shape, got .*\(3, 2\)": (ValueError, step_with(1, ONES.T), {}),
        r"one shape, got .*\(3,\)": (ValueError, step_with(2, ALL[0]), {}),
        r"one shape, got .*\(1, 3\)": (ValueError, step_with(4, ONES[:1]), {}),
        r"one shape, got .*\(2, 1\)": (ValueError, step_with(3, ONES[:, :1]), {}),
        "mask must be bool, got float64": (TypeError, step_with(2, ONES), {}),
        "gradient must be finite where mask is True, it holds NaN": (ValueError, step_with(1, NAN), {}),
        "NaN or infinity": (ValueError, step_with(1, INFINITE), {}),
        "step=0": (ValueError, (*FINE[:5], 0, 0.1), {}),
        "rate=-0.1": (ValueError, (*FINE[:5], 1, -0.1), {}),
        "rate=nan": (ValueError, (*FINE[:5], 1, np.nan), {}),
        r"betas=\(1.0, 0.9\)": (ValueError, FINE, {"betas": (1.0, 0.9)}),
        r"betas=\(0.9, -0.1\)": (ValueError, FINE, {"betas": (0.9, -0.1)}),
        "eps=0.0": (ValueError, FINE, {"eps": 0.0}),
        "weight_decay=-1.0": (ValueError, FINE, {"weight_decay": -1.0}),
        "weight_decay=inf": (ValueError, FINE, {"weight_decay": np.inf}),
        "weight_decay=nan": (ValueError, FINE, {"weight_decay": np.nan}),
        "rate=inf": (ValueError, (*FINE[:5], 1, np.inf), {}),
        "eps=inf": (ValueError, FINE, {"eps": np.inf}),
        "eps=nan": (ValueError, FINE, {"eps": np.nan}),
        "eps=-1e-08": (ValueError, FINE, {"eps": -1e-8}),
        r"betas=\(0.9, 1.0\)": (ValueError, FINE, {"betas": (0.9, 1.0)}),
        r"betas=\(nan, 0.9\)": (ValueError, FINE, {"betas": (np.nan, 0.9)}),
    },
}
