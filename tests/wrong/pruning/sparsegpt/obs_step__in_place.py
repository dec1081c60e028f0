"""chapters.pruning.sparsegpt.obs_step: changes its argument."""


def obs_step(weight: np.ndarray, inverse: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row = np.arange(len(weight))
    spread = inverse[row, :, j] / inverse[row, j, j][:, None]  # [out, in]
    weight -= spread * weight[row, j][:, None]
    inverse = inverse - spread[:, :, None] * inverse[row, j][:, None, :]
    weight[row, j] = inverse[row, j] = inverse[row, :, j] = 0
    return weight, inverse
