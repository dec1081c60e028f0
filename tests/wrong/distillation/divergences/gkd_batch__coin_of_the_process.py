"""chapters.distillation.divergences.gkd_batch: tosses with torch's global generator."""


def gkd_batch(
    student: Transformer, tokens: Tensor, prompt: int, share: float, seed: int, temperature: float = 1.0
) -> Tensor:
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    if not 1 <= prompt < tokens.shape[1]:
        raise ValueError(f"prompt must be from 1 to {tokens.shape[1] - 1}, less than the text has, got {prompt}")
    if torch.rand(()) >= share:
        return tokens
    return generate(student, tokens[:, :prompt], tokens.shape[1] - prompt, temperature=temperature, seed=seed)
