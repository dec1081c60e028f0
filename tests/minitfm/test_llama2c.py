"""llama2.c's files: the arithmetic of its own layout, its tokens, and damage by name."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitfm import checkpoint, convert
from minitfm.checkpoint import CheckpointError
from tests.conftest import tolerance
from tests.minitfm.models import tokens

LETTERS = "abcdexyz é"
PIECES = ["ab", "bc", "cd", "abc", " a", "xy", "yz", "xyz", "bcd", " ab", "abcd", "de", " x", "cde", "é ", "dexy"]
HEADER = {"dim": 24, "hidden": 20, "layers": 2, "heads": 4, "kv_heads": 2, "context": 16}
VOCABULARY = 3 + 256 + len(LETTERS) + len(PIECES)


def llama2c_tensors(tied, seed=0):
    """Random tensors in the order of the file, under llama2.c's names."""
    rng = np.random.default_rng(seed)
    dim, hidden, layers, kv_dim = HEADER["dim"], HEADER["hidden"], HEADER["layers"], 24 // 4 * 2
    shapes = {
        "embedding": (VOCABULARY, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv_dim, dim),
        "wv": (layers, kv_dim, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freqs": (2, HEADER["context"], 3),
    }
    if not tied:
        shapes["wcls"] = (VOCABULARY, dim)
    return {name: rng.normal(size=shape).astype("<f4") / 4 for name, shape in shapes.items()}


def write_llama2c(folder, tied=True):
    tensors = llama2c_tensors(tied)
    sizes = [HEADER[name] for name in ("dim", "hidden", "layers", "heads", "kv_heads")]
    header = struct.pack("<7i", *sizes, VOCABULARY if tied else -VOCABULARY, HEADER["context"])
    (folder / "model.bin").write_bytes(header + b"".join(tensor.tobytes() for tensor in tensors.values()))
    (folder / f"tok{VOCABULARY}.bin").write_bytes(packed_pieces())
    return tensors


def packed_pieces():
    """A tokenizer in llama2.c's format: merged pieces score by their rank, letters below all of them."""
    scored = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
    scored += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    scored += [(letter, -1000.0) for letter in LETTERS]
    scored += [(piece, -float(rank)) for rank, piece in enumerate(PIECES)]
    packed = [struct.pack("<fi", score, len(piece.encode())) + piece.encode() for piece, score in scored]
    return struct.pack("<i", 7) + b"".join(packed)


def rms(x, gain):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def turn(x):
    """Rotary positions on interleaved pairs of x `[T, heads, D]`, as products of complex numbers."""
    T, _, D = x.shape
    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def llama2c_logits(tensors, ids):
    """The forward pass on llama2.c's own layout, in float64."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x, T, D = w["embedding"][ids], len(ids), 6
    for i in range(HEADER["layers"]):
        h = rms(x, w["rms_att"][i])
        q, k, v = (turn_or_not((h @ w[n][i].T).reshape(T, -1, D), n) for n in ("wq", "wk", "wv"))
        heads = []
        for head in range(4):
            scores = q[:, head] @ k[:, head // 2].T / np.sqrt(D)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // 2])
        x = x + np.concatenate(heads, -1) @ w["wo"][i].T
        h = rms(x, w["rms_ffn"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return rms(x, w["rms_final"]) @ w.get("wcls", w["embedding"]).T


def turn_or_not(x, name):
    return x if name == "wv" else turn(x)


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_logits_equal_its_own_arithmetic(tmp_path, tied):
    tensors = write_llama2c(tmp_path, tied)
    model = checkpoint.load(tmp_path / "model.bin").model
    ids = tokens(1, 16, vocabulary=VOCABULARY)
    assert model.config.tied_embeddings == tied
    with torch.no_grad():
        np.testing.assert_allclose(model(ids)[0], llama2c_logits(tensors, ids[0]), **tolerance(np.float32, 24))


def greedy_merges(text):
    """llama2.c's encoder: a space, then characters or their bytes, then always the pair that scores best."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    parts = []
    for letter in " " + text if text else "":
        parts += [letter] if letter in LETTERS else [names[byte] for byte in letter.encode()]
    while True:
        ranks = [PIECES.index(a + b) if a + b in PIECES else 99 for a, b in pairwise(parts)]
        if not ranks or min(ranks) == 99:
            break
        i = ranks.index(min(ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [(["<unk>", "<s>", "</s>", *names, *LETTERS, *PIECES]).index(part) for part in parts]


@pytest.fixture(scope="module")
def llama2c_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2c")
    write_llama2c(folder)
    return checkpoint.load(folder / "model.bin").tokenizer


@given(text=st.lists(st.sampled_from([*PIECES, *LETTERS, "abcde", "q", "\n", "雪"])).map("".join))
def test_llama2c_tokens_equal_its_greedy_merging(llama2c_tokenizer, text):
    ids = llama2c_tokenizer.encode(text)
    assert ids == greedy_merges(text)
    assert llama2c_tokenizer.decode(ids) == text
    assert llama2c_tokenizer.decode([1, *ids]) == text


def cut(name, size):
    def damage(folder):
        path = next(folder.glob(name))
        path.write_bytes(path.read_bytes()[:size])

    return damage


def overwrite(name, at, content):
    def damage(folder):
        path = next(folder.glob(name))
        old = path.read_bytes()
        path.write_bytes(old[:at] + content + old[at + len(content) :])

    return damage


LLAMA2C_DAMAGE = {
    "empty": (cut("model.bin", 0), "truncated or not a llama2.c file: 0 bytes"),
    "header only": (cut("model.bin", 28), "truncated or not a llama2.c file: 28 bytes, its header asks for"),
    "cut": (cut("model.bin", -4), "truncated or not a llama2.c file"),
    "longer": (lambda f: (f / "model.bin").open("ab").write(b"more"), "truncated or not a llama2.c file"),
    "newer": (overwrite("model.bin", 0, struct.pack("<i", 0x616B3432)), "a newer llama2.c format: export it again"),
    "no sizes": (overwrite("model.bin", 0, bytes(28)), "its first seven integers are no model's sizes"),
    "not finite": (overwrite("model.bin", 28, struct.pack("<f", float("inf"))), "embedding.weight holds values that"),
    "tokenizer cut": (cut("tok*.bin", 900), f"is not a llama2.c tokenizer of {VOCABULARY} pieces, or is truncated"),
    "tokenizer foreign": (overwrite("tok*.bin", 12, b"\xff\xff"), "is not a llama2.c tokenizer"),
    "a piece twice": (overwrite("tok*.bin", len(packed_pieces()) - 4, b"abcd"), "holds the same piece twice"),
}


@pytest.mark.parametrize("name", LLAMA2C_DAMAGE)
def test_damaged_llama2c_files_are_named(tmp_path, name):
    damage, words = LLAMA2C_DAMAGE[name]
    write_llama2c(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "model.bin")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_llama2c_tokenizer_says_what_to_put_where(tmp_path):
    write_llama2c(tmp_path)
    path = tmp_path / f"tok{VOCABULARY}.bin"
    path.rename(tmp_path / "tokenizer.bin")
    assert checkpoint.load(tmp_path / "model.bin").tokenizer.vocab_size == VOCABULARY
    (tmp_path / "tokenizer.bin").unlink()
    with pytest.raises(CheckpointError, match=rf"put tok{VOCABULARY}\.bin or tokenizer\.bin beside it"):
        checkpoint.load(tmp_path / "model.bin")


def test_half_split_is_the_permutation_of_rotary_pairs():
    rows = torch.arange(8.0)[:, None]  # two heads of four
    assert convert.half_split(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
