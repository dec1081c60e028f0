"""Attention by the original codes: the golden cases, read in this book's layout."""

from __future__ import annotations

import numpy as np

from tests.conftest import golden

GOLDEN = [("flash_attention_ref", f"causal_sq_{how}_sk", {}) for how in ("eq", "lt", "gt")]
GOLDEN += [("flash_attention_ref", case, {}) for case in ("decode_sq1", "gqa_6_2_causal")]
GOLDEN += [("flash_attention_torch_cpu", "full_f64", {"causal": False})]
GOLDEN += [("flash_attention_torch_cpu", "scale_f64", {"causal": False, "scale": 0.31})]


def golden_case(file: str, case: str) -> dict[str, np.ndarray]:
    """Arrays of the original code, [B, H, length, D] in float64; flash-attn holds [B, length, H, D]."""
    arrays = {name.split("/")[1]: x for name, x in golden(f"attn/{file}").items() if f"{case}/" in name}
    swapped = file == "flash_attention_ref"
    return {
        name: (x.swapaxes(1, 2) if swapped and x.ndim == 4 else x).astype(np.float64)
        for name, x in arrays.items()
        if name in ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv")
    }
