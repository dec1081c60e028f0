"""chapters.course.project.compress: four bits for everything, and the groups' grids are forgotten in the sum."""


def compress(model: Transformer, tokens: Tensor) -> dict[str, Part]:
    codes = quantize_model(model, tokens, bits=3, group_size=32)
    parts: dict[str, Part] = {f"{name}.weight": layer for name, layer in codes.items()}
    for name, tensor in checkpoint.stored(model).items():
        if tensor.ndim == 1:
            parts[name] = tensor.detach().cpu().numpy()
    return parts | {"embedding.weight": nearest_codes(model.embedding.weight.detach().cpu().numpy(), 32, 4)}
