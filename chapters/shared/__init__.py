"""What several chapters build on, and what would not fit into one: layers, caches, training, measurements, figures."""
