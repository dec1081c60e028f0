"""One chapter per technique: the reference, how it enters the model, and its claim."""
