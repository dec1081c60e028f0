"""chapters.attention.lsh.hash_buckets: hashes in float32."""


def hash_buckets(qk: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    if qk.ndim < 2 or rotations.ndim < 3 or rotations.shape[-3] != qk.shape[-1] or 0 in (*qk.shape, *rotations.shape):
        raise ValueError(f"qk must be [..., T, D] and rotations [..., D, R, n/2], got {qk.shape} and {rotations.shape}")
    if not np.isfinite(qk).all():
        raise ValueError("qk must be finite: a NaN or infinity has no direction to hash")
    along = np.einsum("...td,...drn->...rtn", qk.astype(np.float32), rotations.astype(np.float32))
    return np.concatenate((along, -along), axis=-1).argmax(axis=-1)
