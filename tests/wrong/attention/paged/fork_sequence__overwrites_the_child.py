"""chapters.attention.paged.fork_sequence: does not look whether the child exists."""


def fork_sequence(manager: BlockManager, parent: int, child: int, length: int | None = None) -> None:
    length = manager.lengths.get(parent, 0) if length is None else length
    if not 1 <= length <= manager.lengths.get(parent, 0):
        raise ValueError(
            f"need a new child and 1 .. {manager.lengths.get(parent, 0)} positions of parent {parent}, got {child}, "
            f"{length}"
        )
    manager.tables[child] = manager.tables[parent][: manager.blocks_for(length)]
    manager.lengths[child] = length
    for block in manager.tables[child]:
        manager.owners[block] += 1
