"""One Triton kernel file per technique, under the names of the chapters."""
