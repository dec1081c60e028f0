"""Small random models in which nothing is degenerate: no zero projection, no norm gain of one."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from minitfm.config import Config
from minitfm.model import Transformer
from minitfm.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, again and again; 12 dogs watch. Ünïcödé 雪 too.\n\n" * 4


def tiny_config(**changes) -> Config:
    """2 layers of width 16, 4 query heads on 2 key/value heads, a vocabulary of 50."""
    sizes = {"vocab_size": 50, "dim": 16, "hidden_dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32}
    return Config(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes) -> Transformer:
    """A model of `tiny_config` in evaluation mode, weights and gains drawn from `seed`."""
    model = Transformer(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 4 if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of 280 tokens."""
    return Tokenizer.train([TEXT], 280)


def tokens(*shape: int, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


HEADS = st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1), (1, 1), (6, 2)])  # (query, key/value): MHA, GQA, MQA
