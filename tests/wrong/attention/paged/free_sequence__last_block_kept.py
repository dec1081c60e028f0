"""chapters.attention.paged.free_sequence: forgets the last block."""


def free_sequence(manager: BlockManager, sequence: int) -> None:
    if sequence not in manager.tables:
        raise ValueError(f"sequence {sequence} is not there, or was freed already")
    for block in manager.tables.pop(sequence)[:-1]:
        manager.release(block)
    del manager.lengths[sequence]
