"""chapters.quantization.embedding_groups.grouped_product: divides by a number of groups that may be 0."""


def grouped_product(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, weight_codes: np.ndarray, weight_scale: float
) -> np.ndarray:
    groups, channels = len(scale), codes.shape[-1]
    if scale.shape != zero.shape or channels % groups or weight_codes.shape[-1] != channels:
        raise ValueError(
            f"codes {codes.shape}, scale {scale.shape}, zero {zero.shape}, weight_codes {weight_codes.shape} do not fit"
        )
    x = codes.reshape(len(codes), groups, -1).astype(np.int32)
    w = weight_codes.reshape(len(weight_codes), groups, -1).astype(np.int32)
    total = np.einsum("tgc,ogc->gto", x, w) - zero.astype(np.int32)[:, None, None] * w.sum(-1).T[:, None, :]
    return weight_scale * np.einsum("gto,g->to", total.astype(np.float64), scale.astype(np.float64))
