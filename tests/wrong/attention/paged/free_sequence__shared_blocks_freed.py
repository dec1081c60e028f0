"""chapters.attention.paged.free_sequence: frees blocks that others still own."""


def free_sequence(manager: BlockManager, sequence: int) -> None:
    if sequence not in manager.tables:
        raise ValueError(f"sequence {sequence} is not there, or was freed already")
    for block in manager.tables.pop(sequence):
        manager.owners[block] = 0
        manager.free_blocks.append(block)
    del manager.lengths[sequence]
