"""What a model reads from memory to decode one token, counted from its sizes.

One sequence is decoded, and each number is read once: the linear layers of the blocks in the bits that a weight of them
takes; in 16 bits the head, one row of the embedding, the norms, and the keys and values of the tokens in context.
Activations are left out, they are small, and so is what the token itself writes.

    reads(config, bits=4.25, context=512).total      # bytes
"""

from __future__ import annotations

from dataclasses import dataclass

from minitfm.config import Config

PLAIN_BYTES = 2  # of a number that no technique here makes smaller: 16 bits


@dataclass(frozen=True)
class Reads:
    """Bytes that one decoded token reads: `weights` of the blocks, `rest` of the model, and `cache`."""

    weights: float
    rest: int
    cache: int

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weights + self.rest + self.cache


def reads(config: Config, bits: float, context: int, layers: int | None = None) -> Reads:
    """Count what a token reads that sees `context` tokens, where a weight of the block linears takes `bits`.

    layers   how many of the model's layers are left (None: all). The others have no norms and no cache; that they have
             no weights is said by `bits`, which the leaderboard counts over the weights that the plain model has
    Raises ValueError for negative bits or context, or for layers that the model does not have.
    """
    layers = config.layers if layers is None else layers
    if bits < 0 or context < 0 or not 0 <= layers <= config.layers:
        raise ValueError(
            f"need bits and context from 0 on and at most {config.layers} layers, got {bits}, {context} and {layers}"
        )
    norms = (2 * layers + 1) * config.dim
    rest = config.vocab_size * config.dim + config.dim + norms  # head, row of the embedding, norms
    cache = 2 * layers * config.kv_heads * config.head_dim * context
    return Reads(bits * block_weights(config) / 8, PLAIN_BYTES * rest, PLAIN_BYTES * cache)


def block_weights(config: Config) -> int:
    """Weights in the linear layers of all blocks."""
    attention = 2 * config.dim * (config.heads + config.kv_heads) * config.head_dim  # queries, outputs; keys, values
    feed_forward = (3 if config.activation == "swiglu" else 2) * config.dim * config.hidden_dim
    return config.layers * (attention + feed_forward)
