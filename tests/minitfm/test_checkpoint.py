"""Checkpoints: what was saved is what is loaded, a failure leaves the old one, and damage is named."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minitfm import checkpoint, data, surgery
from minitfm.checkpoint import CheckpointError
from minitfm.config import RopeScaling
from minitfm.evaluate import bits_per_byte
from tests.minitfm.models import TEXT, tiny_model, tiny_tokenizer, tokens

TOKENIZER = tiny_tokenizer()


def saved(folder: Path, seed: int = 0, **changes):
    model = tiny_model(seed, vocab_size=TOKENIZER.vocab_size, **changes)
    checkpoint.save(folder, model, TOKENIZER, {"seed": seed})
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": False, "activation": "relu"},
        {"kv_heads": 1, "head_dim": 6, "rope_scaling": RopeScaling(factor=4.0, original_context=8)},
    ],
)
def test_a_checkpoint_gives_back_what_was_saved(tmp_path, changes):
    model = saved(tmp_path / "deep" / "folder", **changes)
    loaded = checkpoint.load(tmp_path / "deep" / "folder")
    assert loaded.model.config == model.config and loaded.info == {"seed": 0}
    assert not loaded.model.training
    assert torch.equal(loaded.model(tokens(2, 9)), model(tokens(2, 9)))
    assert loaded.tokenizer.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert (loaded.tokenizer.begin, loaded.tokenizer.end) == (TOKENIZER.begin, TOKENIZER.end)
    assert set(content(tmp_path / "deep" / "folder")) == {
        *("config.json", "model.safetensors", "tokenizer.json", "training.json")
    }


def test_the_seams_reach_the_loaded_model(tmp_path):
    saved(tmp_path)
    loaded = checkpoint.load(tmp_path, attend=lambda q, k, v: torch.zeros_like(q))
    assert loaded.model.blocks[0].attention.attend(torch.ones(1), None, None) == 0


class Steps(nn.Module):
    """A layer of whole numbers, held in 8 bits."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.steps = nn.Buffer(torch.arange(rows * columns).reshape(rows, columns).to(torch.int8) % 5)

    def forward(self, x):
        return x @ self.steps.float().T


def with_steps(model, tensors) -> None:
    """A `prepare`: one layer becomes `Steps`, as wide as the checkpoint has it. It notices what it cannot read."""
    columns = tensors[f"{REPLACED}.steps"].shape[1]
    if columns > 99:
        raise ValueError("too wide\nfor this test")
    surgery.replace(model, REPLACED, Steps(surgery.linears(model)[REPLACED].out_features, columns))


REPLACED = "blocks.1.feed_forward.down_proj"


def saved_with_steps(folder, columns=None):
    model = tiny_model(vocab_size=TOKENIZER.vocab_size)
    layer = surgery.linears(model)[REPLACED]
    surgery.replace(model, REPLACED, Steps(layer.out_features, columns or layer.in_features))
    checkpoint.save(folder, model, TOKENIZER)
    return model


def test_prepare_puts_other_modules_in_place(tmp_path):
    model = saved_with_steps(tmp_path)
    loaded = checkpoint.load(tmp_path, prepare=with_steps).model
    assert loaded.get_submodule(REPLACED).steps.dtype is torch.int8
    assert torch.equal(loaded(tokens(2, 9)), model(tokens(2, 9)))


def test_without_prepare_other_modules_are_one_clear_error(tmp_path):
    saved_with_steps(tmp_path)
    complaint = (
        rf"1 tensors are missing, {REPLACED}.weight first; 1 tensors are unknown to the model, {REPLACED}.steps first: "
        "if other modules .* load it by the chapter that put them there, which training.json names$"
    )
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint.load(tmp_path)


def test_what_prepare_refuses_is_a_checkpoint_error(tmp_path):
    saved_with_steps(tmp_path, columns=100)
    with pytest.raises(CheckpointError, match=r"too wide for this test$"):
        checkpoint.load(tmp_path, prepare=with_steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_other_modules_get_their_own_dtype(tmp_path, dtype):
    saved_with_steps(tmp_path)
    name = f"{REPLACED}.steps"
    edit_tensors(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} holds {dtype}, not torch.int8"):
        checkpoint.load(tmp_path, prepare=with_steps)


def test_half_precision_is_loaded_as_float32(tmp_path):
    model = saved(tmp_path).half()
    checkpoint.save(tmp_path, model, TOKENIZER)
    loaded = checkpoint.load(tmp_path).model
    assert loaded.embedding.weight.dtype == torch.float32
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_stays_in_the_dtype_that_it_was_stored_in_if_asked(tmp_path, dtype):
    model = saved(tmp_path).to(dtype)
    checkpoint.save(tmp_path, model, TOKENIZER)
    loaded = checkpoint.load(tmp_path, dtype=None).model
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.cos.dtype == torch.float32 and torch.equal(loaded.cos, saved(tmp_path / "plain").cos)
    assert checkpoint.load(tmp_path, dtype=torch.float64).model.norm.weight.dtype == torch.float64


def test_a_failure_to_load_leaves_the_default_dtype(tmp_path):
    saved(tmp_path)
    edit_json("config.json", layers=3)(tmp_path)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    model = saved(tmp_path)
    tensors = checkpoint.read(tmp_path).tensors
    assert set(tensors) == set(checkpoint.stored(model)) and len(tensors) == len(checkpoint.stored(model))
    assert torch.equal(tensors[NORM], model.get_parameter(NORM)) and tensors[NORM] is not tensors[NORM]


@pytest.mark.parametrize("failing", ["write_text", "write_bytes", "replace"])
def test_a_failure_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    saved(tmp_path, seed=1)
    before = content(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, fail)
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*: No space left on device"):
            saved(tmp_path, seed=2)
    assert content(tmp_path) == before
    assert checkpoint.load(tmp_path).info == {"seed": 1}


def test_a_kill_while_writing_leaves_the_old_checkpoint_and_the_next_save_replaces_it(tmp_path, monkeypatch):
    saved(tmp_path, seed=1)
    before = content(tmp_path)
    with monkeypatch.context() as patch:  # a killed process neither renames nor removes anything
        patch.setattr(Path, "replace", lambda *_: None)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        saved(tmp_path, seed=2)
    left = content(tmp_path)
    assert {name: left[name] for name in before} == before and len(left) == 8
    assert checkpoint.load(tmp_path).info == {"seed": 1}
    saved(tmp_path, seed=2)
    assert checkpoint.load(tmp_path).info == {"seed": 2}


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*file"):
        saved(tmp_path / "file" / "folder")
    assert (tmp_path / "file").read_text() == "in the way"


def edit_json(name, **changes):
    def damage(folder):
        values = json.loads((folder / name).read_text())
        values.update(changes)
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name):
    return lambda folder: (folder / name).unlink()


NORM = "blocks.1.attention_norm.weight"
DAMAGE = {
    "no config": (remove("config.json"), "there is no config.json in this folder: give a folder with"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "config is cut": (truncate("config.json", 40), "config.json is not JSON"),
    "config is bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xff"), "config.json is not JSON"),
    "unknown field": (edit_json("config.json", colour=3), "unknown config fields ['colour']"),
    "no vocabulary": (edit_json("config.json", vocab_size=None), "config lacks vocab_size"),
    "text for a number": (edit_json("config.json", dim="wide"), ""),
    "another format": (edit_json("config.json", format=None), "model_type None is not supported"),
    "other sizes": (edit_json("config.json", hidden_dim=25), "config.json asks for [16, 25]"),
    "fewer layers": (edit_json("config.json", layers=1), "tensors are unknown to the model, blocks.1."),
    "more layers": (edit_json("config.json", layers=3), "tensors are missing, blocks.2."),
    "small vocabulary": (edit_json("config.json", vocab_size=99), "the tokenizer has 280 tokens, the model only 99"),
    "bad end": (edit_json("config.json", end=280), "end=280 is not an id"),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing: put the weights there"),
    "weights are cut": (truncate("model.safetensors", 5000), "model.safetensors is truncated or not a safetensors"),
    "weights are empty": (truncate("model.safetensors", 0), "model.safetensors is truncated or not a safetensors"),
    "a tensor is missing": (edit_tensors(lambda t: t.pop(NORM)), f"1 tensors are missing, {NORM} first"),
    "a foreign tensor": (
        edit_tensors(lambda t: t.update(bias=torch.ones(3))),
        "1 tensors are unknown to the model, bias",
    ),
    "integers": (edit_tensors(lambda t: t.update({NORM: t[NORM].int()})), f"{NORM} holds torch.int32, not floating"),
    "not a number": (edit_tensors(lambda t: t[NORM].__setitem__(3, torch.nan)), f"{NORM} holds values that are not"),
    "infinite": (edit_tensors(lambda t: t[NORM].__setitem__(0, -torch.inf)), f"{NORM} holds values that are not"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json is missing: put the model's tokenizer there"),
    "tokenizer is cut": (truncate("tokenizer.json", 900), "is not a tokenizer.json"),
    "a folder for a file": (
        lambda f: (remove("training.json")(f), (f / "training.json").mkdir()),
        "cannot read",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path, name):
    damage, words = DAMAGE[name]
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_path_to_nothing_says_what_to_put_where(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no such checkpoint: give a folder with config\.json, model\.safetensors"
    ):
        checkpoint.load(tmp_path / "missing")


def test_the_base_checkpoint_is_a_good_model_within_its_size():
    files = list(checkpoint.BASE.iterdir())
    assert sum(path.stat().st_size for path in files) < 5_000_000
    model, tokenizer, info = checkpoint.base()
    assert model.num_parameters() == info["parameters"]
    assert info["command"].startswith("python -m minitfm train") and info["python"] and info["seconds"] > 0
    losses = [loss for _, loss in info["validation"]]
    assert losses[-1] == min(losses)
    _, held_out = data.split(data.documents())
    texts = [text[:4000] for text in held_out.values() if len(text) > 4000]
    packed = lzma.compress("".join(texts).encode())
    size = sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts) < 0.75 * 8 * len(packed) / size  # it has read other modules


def test_the_base_checkpoint_uses_its_neurons():
    """Much weight decay lowers the loss and kills neurons (0.3: two in three); pruning them would teach nothing."""
    for block in checkpoint.base().model.blocks:
        layer = block.feed_forward
        strength = layer.gate_proj.weight.norm(dim=1) * layer.down_proj.weight.norm(dim=0)
        assert (strength < 1e-3 * strength.max()).float().mean() < 0.5
