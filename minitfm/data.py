"""The corpus: real prose that every machine has, cut into documents, split so that nothing leaks, and made tokens.

By default it is the documentation of Python's own standard library: the docstrings of its modules and the help topics
of `pydoc`. The sources are parsed, never imported. Interpreters differ by a few percent of it: compare models on one.
"""

from __future__ import annotations

import ast
import gc
import os
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitfm.tokenizer import Tokenizer

NOT_PROSE = set(
    "test tests idle_test site-packages dist-packages __pycache__ lib2to3 turtledemo encodings pydoc_data".split()
)
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py"}
PIECE = 4096  # characters: a single text file is cut into documents of about this size
LONG = 64  # characters: shorter paragraphs ("Example:") recur naturally, a longer one that recurs was copied
FOLDS = 20  # one group of documents in 20 is held out, and which fold that is was chosen for its size and mix only:
HELD_OUT = 19  # 5% of the text, a quarter of it help topics (inspect, imaplib, shutil, string methods, ...)


def documents(path: Path | str | None = None) -> dict[str, str]:
    """Texts by name: the standard library's documentation, or what lies at `path`.

    A folder gives one document per text file, named by its path in the folder; a single file is cut at blank lines.
    Paragraphs that stood in an earlier document are left out. Raises ValueError if there is no text.
    """
    if path is None:
        return dict(standard_library())
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        found = unique((file.relative_to(path).as_posix(), read_text(file)) for file in files)
    else:
        found = unique(pieces(path.name, read_text(path)))
    if not found:
        raise ValueError(f"no text in {path}: give a text file, or a folder with {', '.join(sorted(TEXT_SUFFIXES))}")
    return found


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. Raises ValueError that names the file if it is something else."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def pieces(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Cut one text at blank lines into (name#i, piece) of about `PIECE` characters."""
    piece: list[str] = []
    count = 0
    for paragraph in text.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE:
            yield f"{name}#{count}", "\n\n".join(piece)
            piece, count = [], count + 1
    yield f"{name}#{count}", "\n\n".join(piece)


@lru_cache(maxsize=1)
def standard_library() -> dict[str, str]:
    """Documentation of this interpreter's library: "json/decoder" -> its docstrings, "topic:assert" -> its help."""
    root = Path(sysconfig.get_paths()["stdlib"])
    collecting = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and looking for some takes as long as parsing
    try:
        found = unique(library_texts(root))
    finally:
        if collecting:
            gc.enable()
    if not found:
        raise ValueError(f"this Python has no library sources in {root}: give a text with --text PATH")
    return found


def library_texts(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every module under `root` that documents itself, then of every help topic."""
    for file in library_files(root):
        yield file.relative_to(root).with_suffix("").as_posix(), "\n\n".join(docstrings(parse(file)))
    topics = root / "pydoc_data" / "topics.py"
    if topics.exists():
        for name, text in sorted(topic_table(parse(topics)).items()):
            yield f"topic:{name}", text


def library_files(root: Path) -> list[Path]:
    """Source files of the library, sorted; folders that hold none of its prose are not entered."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_PROSE]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def parse(file: Path) -> ast.Module:
    """Syntax tree of a Python file; its warnings are its authors' business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(file.read_bytes())


def docstrings(node: ast.AST) -> Iterator[str]:
    """Cleaned docstrings of a module and of the classes and functions in it, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node):
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from docstrings(child)


def topic_table(tree: ast.Module) -> dict[str, str]:
    """The dictionary that pydoc_data/topics.py assigns."""
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))


def unique(texts: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Documents without the long paragraphs that an earlier one has (modules copy docstrings, topics overlap)."""
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, text in texts:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and not (len(words) >= LONG and words in seen):
                paragraphs.append(paragraph.strip("\n"))
                seen.add(words)
        if paragraphs:
            kept[name] = "\n\n".join(paragraphs)
    return kept


def split(documents: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(train, validation): about one in 20 groups is held out, chosen by a hash of the group's name alone.

    A group is what shares a top-level module or folder, the name up to the first "/": related texts stay on one side,
    and a module that one interpreter holds out is held out by all. Raises ValueError if there is only one group.
    """
    hashes = {name: zlib.crc32(name.partition("/")[0].encode()) for name in documents}
    if len(set(hashes.values())) < 2:
        raise ValueError("all documents belong to one group (one top-level folder): nothing is left to hold out")
    held = {value for value in hashes.values() if value % FOLDS == HELD_OUT}
    if not held or held == set(hashes.values()):  # so few groups that chance gave one side everything
        held = {min(hashes.values())}
    train = {name: text for name, text in documents.items() if hashes[name] not in held}
    return train, {name: text for name, text in documents.items() if hashes[name] in held}


def encode(documents: dict[str, str], tokenizer: Tokenizer) -> Tensor:
    """One stream of tokens, int64 `[T]`: begin, document, end, document, end, ... (begin once, where it is not end)."""
    stream = [tokenizer.begin]
    for text in documents.values():
        stream += [*tokenizer.encode(text), tokenizer.end]
    return torch.tensor(stream)


def sequences(stream: Tensor, length: int) -> Tensor:
    """The stream cut into non-overlapping sequences, `[N, length]`; the tail that fills none is left out."""
    if not 1 <= length <= len(stream):
        raise ValueError(f"length must be between 1 and the stream's {len(stream)} tokens, got {length}")
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def random_batch(stream: Tensor, batch: int, length: int, seed: int | tuple[int, ...]) -> Tensor:
    """`[batch, length]` tokens from random places of the stream; the same seed draws the same places."""
    if batch < 1 or not 1 <= length <= len(stream):
        raise ValueError(f"need batch >= 1 and 1 <= length <= {len(stream)}, got batch={batch}, length={length}")
    starts = np.random.default_rng(seed).integers(0, len(stream) - length + 1, batch)
    return torch.stack([stream[start : start + length] for start in starts])
