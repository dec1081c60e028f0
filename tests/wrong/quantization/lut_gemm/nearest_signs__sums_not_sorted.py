"""chapters.quantization.lut_gemm.nearest_signs: takes the sums for sorted as they are counted."""


def nearest_signs(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    planes = alpha.shape[-1]
    choices = 2 * (np.arange(2**planes)[:, None] >> np.arange(planes)[::-1] & 1) - 1  # [2^planes, planes], −1 first
    sums = alpha @ choices.T
    order = np.broadcast_to(np.arange(sums.shape[-1]), sums.shape)
    sums = np.take_along_axis(sums, order, axis=-1)
    middles = (sums[..., 1:] + sums[..., :-1]) / 2
    place = (values[..., None] >= middles[..., None, :]).sum(axis=-1)  # how many lie below: the place in the order
    return choices[np.take_along_axis(order, place, axis=-1)].astype(np.int8)
