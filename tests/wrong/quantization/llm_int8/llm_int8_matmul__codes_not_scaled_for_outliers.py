"""chapters.quantization.llm_int8.llm_int8_matmul: outliers meet codes without their scale."""


def llm_int8_matmul(
    x: np.ndarray, codes: np.ndarray, absmax: np.ndarray, threshold: float = 6.0, exact: np.ndarray | None = None
) -> np.ndarray:
    fitting = codes.ndim == 2 and x.shape[1:] == codes.shape[1:] and absmax.shape == codes.shape[:1]
    if not fitting or (exact is not None and exact.shape != codes.shape):
        raise ValueError(
            f"x {x.shape}, codes {codes.shape}, absmax {absmax.shape} and "
            f"exact {None if exact is None else exact.shape} do not fit together"
        )
    x_codes, x_absmax, outliers = quantize_rows(x, threshold)
    scale = absmax.astype(np.float64) / 127  # [out]
    y = (x_codes.astype(np.int64) @ codes.T.astype(np.int64)) * (x_absmax[:, None].astype(np.float64) / 127 * scale)
    weight = codes[:, outliers] if exact is None else exact[:, outliers].astype(np.float64)
    return y + x[:, outliers].astype(np.float64) @ weight.T
