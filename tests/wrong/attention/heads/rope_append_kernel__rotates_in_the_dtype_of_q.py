"""kernels.attention.heads.rope_append_kernel: rounds the angles to the dtype of the projection."""


@triton.jit
def rope_append_kernel(
    qkv_ptr, k_ptr, v_ptr, positions_ptr, cos_ptr, sin_ptr, q_ptr, T, heads, kv_heads, capacity,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    sequence, step = token // T, token % T
    position = tl.load(positions_ptr + sequence) + step
    inside = (position >= 0) & (position < capacity)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    every = heads + 2 * kv_heads
    a, b = load_pairs(qkv_ptr + (token * every + head) * D, head < every, D, HALF, INTERLEAVED)
    pair = tl.arange(0, HALF)[None, :]
    known = inside & (pair < D // 2)
    cos = tl.load(cos_ptr + position * (D // 2) + pair, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * (D // 2) + pair, mask=known, other=float("nan"))
    cos, sin = cos.to(a.dtype), sin.to(a.dtype)
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin  # float32, as the tables are
    q_row = q_ptr + ((sequence * heads + head) * T + step) * D
    store_pairs(q_row, turned_a, turned_b, head < heads, D, INTERLEAVED)
    k_head = head - heads
    k_row = k_ptr + ((sequence * kv_heads + k_head) * capacity + position) * D
    store_pairs(k_row, turned_a, turned_b, inside & (k_head >= 0) & (k_head < kv_heads), D, INTERLEAVED)
    v_head = k_head - kv_heads
    v_row = v_ptr + ((sequence * kv_heads + v_head) * capacity + position) * D
    store_pairs(v_row, a, b, inside & (v_head >= 0) & (v_head < kv_heads), D, INTERLEAVED)
