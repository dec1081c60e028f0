"""chapters.quantization.lut_gemm.nearest_signs: takes the place among the sorted sums for the choice of signs."""


def nearest_signs(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    planes = alpha.shape[-1]
    choices = 2 * (np.arange(2**planes)[:, None] >> np.arange(planes)[::-1] & 1) - 1  # [2^planes, planes], −1 first
    sums = alpha @ choices.T
    order = np.argsort(sums, axis=-1, kind="stable")
    sums = np.take_along_axis(sums, order, axis=-1)
    middles = (sums[..., 1:] + sums[..., :-1]) / 2
    place = (values[..., None] >= middles[..., None, :]).sum(axis=-1)  # how many lie below: the place in the order
    return choices[place].astype(np.int8)
