"""Text to token ids and back: a byte-level BPE, so that any text at all can be written with a small vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


class Tokenizer:
    """A `tokenizers.Tokenizer` and the ids that open and close a document.

    `begin` stands before a document's first token and `end` after its last; tokenizers trained here use one token,
    <|endoftext|>, for both. `encode` adds neither, and text that spells a special token stays text.
    """

    def __init__(self, inner: tokenizers.Tokenizer, begin: int | None = None, end: int | None = None) -> None:
        end = inner.token_to_id(END) if end is None else end
        if end is None:
            raise ValueError(f"the tokenizer has no {END} token; say which ids begin and end a document")
        self.begin = end if begin is None else begin
        self.end = end
        for name, token in (("begin", self.begin), ("end", self.end)):
            if not 0 <= token < inner.get_vocab_size():
                raise ValueError(f"{name}={token} is not an id of a vocabulary of {inner.get_vocab_size()}")
        self.inner = inner
        self.inner.encode_special_tokens = True  # a document cannot end itself by quoting <|endoftext|>

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts`. `vocab_size` counts the 256 bytes and <|endoftext|>; ValueError below 257."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END}), got {vocab_size}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `begin` or `end`."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out. Bytes that are not UTF-8 become U+FFFD."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self.inner.to_str()

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json. It has no place for `begin` and `end`: a checkpoint's config.json holds them."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, begin: int | None = None, end: int | None = None) -> Tokenizer:
        """Read a tokenizer.json, ours or Hugging Face's. ValueError if it is none, OSError if it cannot be read."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        return cls(inner, begin, end)
