"""chapters.quantization.lut_gemm.lut_gemm: computes in the precision of x."""


def lut_gemm(
    x: np.ndarray, packed: np.ndarray, alpha: np.ndarray, offset: np.ndarray | None, group_size: int
) -> np.ndarray:
    planes, fours, words, _ = packed.shape
    rows, groups = len(alpha), alpha.shape[1]
    fitting = alpha.shape == (rows, groups, planes) and -(-rows // 4) == fours and group_size % 8 == 0
    if not fitting or groups * group_size != 32 * words or x.ndim != 2 or x.shape[1] != 32 * words:
        raise ValueError(f"x {x.shape}, packed {packed.shape}, alpha {alpha.shape}, group_size={group_size} do not fit")
    if offset is not None and offset.shape != (rows, groups):
        raise ValueError(f"offset must be [out, groups] = {(rows, groups)}, got {offset.shape}")
    found = sign_sums(x).astype(x.dtype)[
        :, np.arange(4 * words), keys(packed)[:, :rows]
    ]  # [tokens, planes, out, in / 8]
    dots = found.reshape(len(x), planes, rows, groups, -1).sum(axis=-1)
    y = np.einsum("tpog,ogp->to", dots, alpha.astype(np.float64))
    totals = x.astype(np.float64).reshape(len(x), groups, -1).sum(axis=-1)
    return y if offset is None else y + totals @ offset.astype(np.float64).T
