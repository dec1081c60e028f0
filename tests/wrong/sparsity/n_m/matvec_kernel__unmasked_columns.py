"""kernels.sparsity.n_m.matvec_kernel: reads the next row's words, and past the end of x, where a tile is wider than the row."""


@triton.jit
def matvec_kernel(x, values, metadata, y, N, words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    dtype: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, WORDS, 4), tl.float32)
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = word < words
        tile = tl.load(x + word[:, None] * 16 + tl.arange(0, 16))
        first, second, third, fourth = members(tl.reshape(tile, (WORDS, 4, 2, 2)))
        group = as_bits(first) | as_bits(second) << 16 | as_bits(third) << 32 | as_bits(fourth) << 48
        live = (row < N)[:, None] & (word >= 0)[None, :]
        lower, higher, nibble = load_groups(values, metadata, row[:, None] * words + word[None, :], live)
        acc += lower.to(tl.float32) * slot(group[None], (nibble & 3) * 16, dtype).to(tl.float32)
        acc += higher.to(tl.float32) * slot(group[None], (nibble & 12) * 4, dtype).to(tl.float32)
    tl.store(y + row, tl.sum(tl.sum(acc, axis=2), axis=1).to(dtype), mask=row < N)
