"""chapters.quantization.gptq.inverse_factor: damps the caller's Hessian."""


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    damped = hessian
    damped[np.diag_indices(len(damped))] += damping * np.diag(hessian).mean()
    try:
        if (np.diag(np.linalg.cholesky(damped)) ** 2 < 1e-12 * np.diag(damped)).any():  # its last digits only
            raise np.linalg.LinAlgError
        return np.linalg.cholesky(np.linalg.inv(damped)).T
    except np.linalg.LinAlgError:
        raise ValueError(f"hessian is not positive definite with damping={damping}: raise it, or use more text") from None
