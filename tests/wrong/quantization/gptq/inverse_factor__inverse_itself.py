"""chapters.quantization.gptq.inverse_factor: the upper half of the inverse instead of its Cholesky factor."""


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    try:
        if (np.diag(np.linalg.cholesky(damped)) ** 2 < 1e-12 * np.diag(damped)).any():  # its last digits only
            raise np.linalg.LinAlgError
        return np.triu(np.linalg.inv(damped))
    except np.linalg.LinAlgError:
        raise ValueError(f"hessian is not positive definite with damping={damping}: raise it, or use more text") from None
