"""chapters.attention.patterns.block_mask: the masks of full blocks are kept, too."""


def block_mask(
    masks: Pattern | np.ndarray | Sequence[Pattern | np.ndarray], T: int, S: int, block_q: int = 64, block_k: int = 64
) -> BlockMask:
    masks = checked_masks(masks, T, S, block_q=block_q, block_k=block_k)
    partial = np.zeros((len(masks), -(-T // block_q), -(-S // block_k)), dtype=bool)
    full, tokens = partial.copy(), [np.zeros((0, block_q, block_k), dtype=bool)]
    for (head, mask), row in itertools.product(enumerate(masks), range(partial.shape[1])):
        rows = slice(row * block_q, min((row + 1) * block_q, T))
        seen = np.zeros((block_q, partial.shape[2] * block_k), dtype=bool)
        seen[: rows.stop - rows.start, :S] = visible(mask, rows, T, S)
        blocks = seen.reshape(block_q, -1, block_k).swapaxes(0, 1)  # [C, block_q, block_k]
        full[head, row] = blocks.all(axis=(1, 2))
        partial[head, row] = blocks.any(axis=(1, 2)) & ~full[head, row]
        tokens.append(blocks[partial[head, row] | full[head, row]])
    return BlockMask((T, S), block_q, block_k, partial, full, np.concatenate(tokens))
