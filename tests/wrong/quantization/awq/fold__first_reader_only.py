"""chapters.quantization.awq.fold: scales one of the layers that share the input."""


@torch.no_grad()
def fold(previous: nn.Module, readers: Sequence[nn.Linear], scales: Tensor) -> None:
    channels = {len(previous.get_parameter("weight")), *(reader.in_features for reader in readers)}
    if scales.dim() != 1 or channels != {len(scales)}:
        raise ValueError(f"scales must be [in], got {tuple(scales.shape)} for layers of {sorted(channels)} channels")
    if not ((scales > 0) & scales.isfinite()).all():
        raise ValueError("scales must be positive and finite")
    for parameter in previous.parameters(recurse=False):  # weight, and bias if there is one
        parameter /= scales.to(parameter).unflatten(0, (-1, *[1] * (parameter.dim() - 1)))
    for reader in readers[:1]:
        reader.weight *= scales.to(reader.weight)
