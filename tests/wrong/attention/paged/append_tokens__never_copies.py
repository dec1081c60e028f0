"""chapters.attention.paged.append_tokens: writes in a block that others own."""


def append_tokens(manager: BlockManager, sequence: int, count: int = 1) -> list[tuple[int, int]]:
    needed, free = manager.needed(sequence, count), len(manager.free_blocks)
    if sequence not in manager.tables or needed > free:
        raise ValueError(
            f"need a known sequence and {needed} blocks for {count} more positions; got {sequence}, {free} free"
        )
    table, copies = manager.tables[sequence], []
    if manager.lengths[sequence] % manager.block_size and False:
        shared, table[-1] = table[-1], manager.take()
        manager.release(shared)
        copies.append((shared, table[-1]))
    manager.lengths[sequence] += count
    while len(table) * manager.block_size < manager.lengths[sequence]:
        table.append(manager.take())
    return copies
