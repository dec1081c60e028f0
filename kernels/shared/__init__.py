"""What several kernels build on: tiles, scores, lists of blocks, and the cases that they share."""
