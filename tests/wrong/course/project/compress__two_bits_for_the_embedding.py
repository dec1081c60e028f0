"""chapters.course.project.compress: saves at the embedding, which is also the head."""


def compress(model: Transformer, tokens: Tensor) -> dict[str, Part]:
    embedding = model.embedding.weight.detach().cpu().numpy()
    codes = quantize_model(model, tokens, bits=3)
    parts: dict[str, Part] = {f"{name}.weight": layer for name, layer in codes.items()}
    for name, tensor in checkpoint.stored(model).items():
        if tensor.ndim == 1:
            parts[name] = tensor.detach().cpu().numpy()
    return parts | {"embedding.weight": nearest_codes(embedding, None, 2)}
