"""chapters.pruning.sparsegpt.obs_step: goes on with the inverse that still knows the weight that is gone."""


def obs_step(weight: np.ndarray, inverse: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row = np.arange(len(weight))
    spread = inverse[row, :, j] / inverse[row, j, j][:, None]  # [out, in]
    weight = weight - spread * weight[row, j][:, None]
    inverse = inverse.copy()
    weight[row, j] = inverse[row, j] = inverse[row, :, j] = 0
    return weight, inverse
