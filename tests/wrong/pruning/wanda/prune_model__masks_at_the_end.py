"""chapters.pruning.wanda.prune_model: prunes when all masks are found."""


def prune_model(model: Transformer, tokens: Tensor, choose: Choose) -> Masks:
    layers, masks = surgery.linears(model), {}
    for _, names in groupby(layers, lambda name: name.split(".")[1]):
        found = {}
        for name, norms in recorded_norms(model, tokens, list(names)).items():
            weight = layers[name].weight.detach()
            if not (weight.isfinite().all() and norms.isfinite().all()):
                raise ValueError(f"{name}: must be finite")
            found[name] = choose(weight, norms)
        masks |= found
    apply_masks(model, masks)
    return masks
