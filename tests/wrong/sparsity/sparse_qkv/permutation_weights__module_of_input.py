"""chapters.sparsity.sparse_qkv.permutation_weights: opens the gate of the module in which the input stands."""


def permutation_weights(order: np.ndarray, modules: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.asarray(order)
    if order.ndim != 1 or order.size == 0 or not np.array_equal(np.sort(order), np.arange(order.size)):
        raise ValueError(f"order must be a permutation of 0 .. d - 1, got {order}")
    if modules < 1 or order.size % modules:
        raise ValueError(f"modules must be positive and divide the {order.size} inputs, got {modules}")
    module, channel = np.divmod(np.arange(order.size), order.size // modules)  # where each output stands
    gates, shared = np.zeros((modules, order.size)), np.zeros((order.size, order.size // modules))
    gates[module, np.arange(order.size)] = 1  # an input passes the gate of its own module only
    shared[order, channel] = 1
    return gates, shared
