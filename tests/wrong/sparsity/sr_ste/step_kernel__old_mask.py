"""kernels.sparsity.sr_ste.step_kernel: the sparse weight has the mask of the old weight."""


@triton.jit
def step_kernel(weight, gradient, moved, sparse, count, rate, decay, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offsets < count
    w = tl.load(weight + offsets, mask=live, other=0.0)
    g = tl.load(gradient + offsets, mask=live, other=0.0).to(tl.float32)
    dropped = tl.where(chosen(w, N, M), 0.0, w.to(tl.float32))
    new = (w.to(tl.float32) - rate * (g + decay * dropped)).to(w.dtype)
    tl.store(moved + offsets, new, mask=live)
    stays = tl.where(chosen(w, N, M), new.to(tl.float32), 0.0)
    tl.store(sparse + offsets, stays.to(sparse.dtype.element_ty), mask=live)
