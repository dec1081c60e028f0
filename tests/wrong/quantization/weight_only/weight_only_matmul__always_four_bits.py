"""chapters.quantization.weight_only.weight_only_matmul: takes every word for eight codes of 4 bits."""


def weight_only_matmul(
    x: np.ndarray, packed: np.ndarray, scale: np.ndarray, zero: np.ndarray, group_size: int, bits: int = 4
) -> np.ndarray:
    codes = unpack(packed)
    columns = codes.shape[1]
    fitting = (len(packed), scale.shape[-1]) == scale.shape == zero.shape and scale.shape[-1] * group_size == columns
    if not fitting or x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"x {x.shape}, packed {packed.shape}, scale {scale.shape}, zero {zero.shape} do not fit")
    group = np.arange(columns) // group_size
    weight = dequantize(codes, scale.astype(np.float64)[:, group], zero.astype(np.float64)[:, group])
    return x.astype(np.float64) @ weight.T
