"""chapters.quantization.calibration.count_magnitudes: takes a width below 0."""


def count_magnitudes(x: np.ndarray, width: float, bins: int) -> tuple[np.ndarray, float]:
    if np.size(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"x must be finite and not empty, got shape {np.shape(x)}")
    if width == 0 or bins < 1:
        raise ValueError(f"need width > 0 and bins >= 1, got width={width}, bins={bins}")
    magnitudes = np.abs(x).ravel()
    places = np.minimum(magnitudes / magnitudes.dtype.type(width), bins - 1).astype(np.int64)
    return np.bincount(places, minlength=bins), float(magnitudes.max())
