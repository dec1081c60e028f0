"""chapters.quantization.gptq.inverse_factor: answers with rounding noise where there is no inverse."""


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    damped = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    try:
        values, vectors = np.linalg.eigh(damped)
        values = np.maximum(values, 1e-12)
        return np.linalg.cholesky(vectors / values @ vectors.T).T
    except np.linalg.LinAlgError:
        raise ValueError(f"hessian is not positive definite with damping={damping}: raise it, or use more text") from None
