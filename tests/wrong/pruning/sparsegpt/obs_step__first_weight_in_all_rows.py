"""chapters.pruning.sparsegpt.obs_step: drops the weight of the first row in every row."""


def obs_step(weight: np.ndarray, inverse: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row, j = np.arange(len(weight)), np.full(len(weight), j[0])
    spread = inverse[row, :, j] / inverse[row, j, j][:, None]  # [out, in]
    weight = weight - spread * weight[row, j][:, None]
    inverse = inverse - spread[:, :, None] * inverse[row, j][:, None, :]
    weight[row, j] = inverse[row, j] = inverse[row, :, j] = 0
    return weight, inverse
