"""chapters.course.project.compress: rounds to nearest, which is what there is to beat."""


def compress(model: Transformer, tokens: Tensor) -> dict[str, Part]:
    return baseline(model)
