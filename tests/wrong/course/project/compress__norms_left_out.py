"""chapters.course.project.compress: norms are stored as ones."""


def compress(model: Transformer, tokens: Tensor) -> dict[str, Part]:
    codes = quantize_model(model, tokens, bits=3)
    parts: dict[str, Part] = {f"{name}.weight": layer for name, layer in codes.items()}
    for name, tensor in checkpoint.stored(model).items():
        if tensor.ndim == 1:
            parts[name] = np.ones(tensor.shape)
    return parts | {"embedding.weight": nearest_codes(model.embedding.weight.detach().cpu().numpy(), None, 4)}
