"""chapters.quantization.gptq.inverse_factor: compares the factor's diagonal with 1e-12 itself."""


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    try:
        if (np.diag(np.linalg.cholesky(damped)) ** 2 < 1e-12).any():  # its last digits only
            raise np.linalg.LinAlgError
        return np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        raise ValueError(f"hessian is not positive definite with damping={damping}; raise it, use more text") from None
