"""kernels.sparsity.sparse_qkv.step_kernel: meets the new token with the first tap."""


@triton.jit
def step_kernel(
    x, gates, shared, q_kernel, k_kernel, v_kernel, past, q, k, v, state, B, d, modules,
    M: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HALO: tl.constexpr = TAPS - 1
    dtype: tl.constexpr = x.dtype.element_ty
    module = tl.program_id(0)
    row, channel = (tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, CHANNELS)[None, :]
    live = row < B
    z = gated_products(x + row * d, live, gates, shared, module - 1, d, modules, M, CHANNELS, BLOCK, 3)
    q_acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    k_acc, v_acc = q_acc, q_acc
    at, inside = (row * HALO * modules + module) * M + channel, live & (channel < M)
    for side in tl.static_range(3):
        known = inside & (module + side >= 1) & (module + side <= modules)
        for tap in tl.static_range(HALO):
            before = tl.load(past + at + (tap * modules + side - 1) * M, mask=known, other=0.0)
            q_acc, k_acc, v_acc = add_tap(before, tap + 1, side, q_kernel, k_kernel, v_kernel, q_acc, k_acc, v_acc, M)
            if side == 1 and tap > 0:
                tl.store(state + at + (tap - 1) * modules * M, before, mask=inside)
        new = z[side].to(dtype)
        q_acc, k_acc, v_acc = add_tap(new, 0, side, q_kernel, k_kernel, v_kernel, q_acc, k_acc, v_acc, M)
        if side == 1 and HALO > 0:
            tl.store(state + at + (HALO - 1) * modules * M, new, mask=inside)
    out = (row * modules + module) * M + channel
    tl.store(q + out, q_acc.to(dtype), mask=inside)
    tl.store(k + out, k_acc.to(dtype), mask=inside)
    tl.store(v + out, v_acc.to(dtype), mask=inside)
