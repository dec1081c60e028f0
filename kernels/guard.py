"""What every kernel wrapper checks before it launches: bad input is refused in words, never computed on."""

from __future__ import annotations

import os

import torch
from torch import Tensor

COMPILE_ONLY = False  # `python -m kernels check` sets it: launches are then compiled and recorded, not run


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for the GPU; it must have been asked for before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_launchable(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors sit on one device that can run a kernel: CUDA, or CPU when interpreting."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    require(len(set(devices.values())) == 1, f"tensors must share one device, got {devices}")
    kind = next(iter(devices.values())).type
    require(
        kind == "cuda" or (kind == "cpu" and (interpreting() or COMPILE_ONLY)),
        f"a Triton kernel needs CUDA tensors, got {kind}; on a machine without a GPU set TRITON_INTERPRET=1 "
        "before importing triton to run it in the interpreter",
    )


def require_contiguous(**tensors: Tensor) -> None:
    """Raise ValueError for the first tensor that is not contiguous."""
    for name, tensor in tensors.items():
        require(
            tensor.is_contiguous(),
            f"{name} must be contiguous, got strides {tensor.stride()} for {tuple(tensor.shape)}",
        )


def require_dtype(allowed: tuple[torch.dtype, ...], **tensors: Tensor) -> None:
    """Raise TypeError for the first tensor whose dtype is not allowed."""
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} must have dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}")
