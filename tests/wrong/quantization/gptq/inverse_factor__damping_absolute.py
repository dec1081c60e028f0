"""chapters.quantization.gptq.inverse_factor: adds the damping itself instead of that share of the mean diagonal."""


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    damped = hessian + damping * np.eye(len(hessian))
    try:
        if (np.diag(np.linalg.cholesky(damped)) ** 2 < 1e-12 * np.diag(damped)).any():  # its last digits only
            raise np.linalg.LinAlgError
        return np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        raise ValueError(f"hessian is not positive definite with damping={damping}: raise it, or use more text") from None
