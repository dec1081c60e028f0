"""kernels.attention.linformer.attend_kernel: query head h reads slots of head h modulo their number."""


@triton.jit
def attend_kernel(
    q_ptr, keys_ptr, values_ptr, out_ptr, q_stride, keys_stride, values_stride, out_stride, heads, group, T, slots,
    scale2, D: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    keys_ptr += head_start(batch, head % (heads // group), keys_stride, D)
    values_ptr += head_start(batch, head % (heads // group), values_stride, D)
    q_ptr += head_start(batch, head, q_stride, D)
    out_ptr += head_start(batch, head, out_stride, D)
    keys = load_tile(keys_ptr, 0, keys_stride, slots, D, SLOTS, BLOCK_D)
    values = load_tile(values_ptr, 0, values_stride, slots, D, SLOTS, BLOCK_D)
    live = (tl.arange(0, SLOTS) < slots)[None, :]
    for tile in range(tl.program_id(1), tl.cdiv(T, BLOCK_Q), tl.num_programs(1)):
        q = load_tile(q_ptr, tile * BLOCK_Q, q_stride, T, D, BLOCK_Q, BLOCK_D)
        scores = tl.where(live, tl.dot(q, tl.trans(keys), input_precision="ieee") * scale2, -INFINITY)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])  # there is a slot: the maximum is finite
        total = tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        store_tile(out_ptr, acc / total[:, None], tile * BLOCK_Q, out_stride, T, D, BLOCK_Q, BLOCK_D)
