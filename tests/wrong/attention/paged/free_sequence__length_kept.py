"""chapters.attention.paged.free_sequence: leaves the length of the sequence behind."""


def free_sequence(manager: BlockManager, sequence: int) -> None:
    if sequence not in manager.tables:
        raise ValueError(f"sequence {sequence} is not there, or was freed already")
    for block in manager.tables.pop(sequence):
        manager.release(block)
