"""The sizes of a decoder-only transformer: everything that a checkpoint must say besides its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

ACTIVATIONS = ("swiglu", "relu")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies to a longer context.

    Frequencies whose wavelength exceeds `original_context / low_frequency_factor` are divided by `factor`, those
    below `original_context / high_frequency_factor` are kept, and those in between are blended.
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Config:
    """Shape of a `Transformer`.

    `kv_heads == heads` is multi-head attention (MHA), `kv_heads == 1` multi-query (MQA), anything between
    grouped-query (GQA). `head_dim` defaults to `dim // heads`, `kv_heads` to `heads`. Raises ValueError for sizes
    that do not fit together.
    """

    vocab_size: int
    dim: int = 128
    hidden_dim: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    context: int = 512
    activation: str = "swiglu"
    tied_embeddings: bool = True
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        set_default = object.__setattr__  # the dataclass is frozen; these two fields complete themselves
        if self.kv_heads == 0:
            set_default(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            if self.heads < 1 or self.dim % self.heads:
                raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}; give head_dim")
            set_default(self, "head_dim", self.dim // self.heads)
        for name in ("vocab_size", "dim", "hidden_dim", "layers", "heads", "kv_heads", "head_dim", "context"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")

    def to_dict(self) -> dict:
        """Plain dictionary for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """Inverse of `to_dict`. Raises ValueError for an unknown or missing field."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown config fields {unknown}; known are {sorted(known)}")
        if "vocab_size" not in values:
            raise ValueError("config lacks vocab_size")
        values = dict(values)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**values)
