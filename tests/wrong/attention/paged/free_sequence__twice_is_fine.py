"""chapters.attention.paged.free_sequence: lets a sequence be freed twice."""


def free_sequence(manager: BlockManager, sequence: int) -> None:
    if sequence not in manager.tables:
        return
    for block in manager.tables.pop(sequence):
        manager.release(block)
    del manager.lengths[sequence]
