"""Students: which layers they start from, what they read, how their training repeats and resumes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from chapters.shared import student_lab
from minitfm import surgery, train
from minitfm.cache import KVCache
from minitfm.checkpoint import CheckpointError
from minitfm.generate import generate
from tests.conftest import tolerance
from tests.minitfm.models import tiny_config, tiny_model, tokens

STREAM = tokens(2000)


def cross_entropy(student, teacher, targets, hidden):
    """A loss that uses all it is given."""
    return (
        F.cross_entropy(student, targets) + (student - teacher).square().mean() + (hidden[0] - hidden[1]).abs().mean()
    )


def test_layers_are_spread_as_distilberts():
    assert student_lab.kept_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert student_lab.kept_layers(4, 2) == [0, 3] and student_lab.kept_layers(5, 1) == [0]


@given(st.integers(1, 40), st.integers(1, 40))
def test_layers_rise_from_the_first_to_the_last(layers, kept):
    layers, kept = max(layers, kept), min(layers, kept)
    found = student_lab.kept_layers(layers, kept)
    assert len(found) == kept and found == sorted(set(found)) and found[0] == 0
    assert kept == 1 or found[-1] == layers - 1


@pytest.mark.parametrize("kept", [0, 3, -1])
def test_a_student_has_no_more_layers_than_its_teacher(kept):
    with pytest.raises(ValueError, match=f"a teacher with 2 layers has 1 to 2, got {kept}"):
        student_lab.from_teacher(tiny_model(), kept)


@torch.no_grad()
def test_a_student_starts_as_layers_of_its_teacher_and_shares_none():
    teacher = tiny_model(layers=5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = student_lab.from_teacher(teacher, 3)
    assert student.config == tiny_config(layers=3) and not student.training and teacher.config.layers == 5
    for place, layer in enumerate((0, 2, 4)):
        mine, its = student.blocks[place].state_dict(), teacher.blocks[layer].state_dict()
        assert all(torch.equal(value, its[name]) for name, value in mine.items())
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert student.head.weight is student.embedding.weight, "tied weights stay tied"
    for parameter in student.parameters():
        parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@torch.no_grad()
def test_a_student_of_all_layers_is_the_teacher_and_a_smaller_one_decodes_with_a_cache():
    teacher, batch = tiny_model(layers=4), tokens(2, 9)
    torch.testing.assert_close(student_lab.from_teacher(teacher, 4)(batch), teacher(batch))
    student = student_lab.from_teacher(teacher, 2)
    cache = KVCache(student.config, batch=2)
    parts = torch.cat(
        [student(batch[:, :5], cache), student(batch[:, 5:6], cache), student(batch[:, 6:], cache)], dim=1
    )
    torch.testing.assert_close(parts, student(batch), **tolerance(torch.float32, 9))
    assert generate(student, batch[:1], 4).shape[-1] >= 4


def test_a_fresh_student_is_drawn_by_its_seed_alone():
    state = torch.get_rng_state()
    one, same, other = (student_lab.fresh(tiny_config(dim=8), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.embedding.weight, same.embedding.weight)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert one.config.dim == 8 and (one.blocks[1].attention.o_proj.weight == 0).all()


def test_hidden_states_are_what_the_head_reads():
    model, batch = tiny_model(), tokens(2, 7)
    logits, hidden = student_lab.logits_and_hidden(model, batch)
    torch.testing.assert_close(logits, model(batch).flatten(0, 1))
    torch.testing.assert_close(model.head(hidden), logits)
    assert hidden.shape == (14, 16) and not model.head._forward_pre_hooks


def test_a_loss_gets_both_models_and_the_next_tokens_and_only_the_student_learns():
    teacher, student, batch, seen = tiny_model(), tiny_model(1, layers=1), tokens(2, 7), []

    def loss(*given):
        seen.append(given)
        return cross_entropy(*given)

    student_lab.taught(teacher, loss)(student, batch).backward()
    found, wanted, targets, hidden = seen[0]
    assert torch.equal(targets, batch[:, 1:].flatten())
    torch.testing.assert_close(found, student(batch[:, :-1]).flatten(0, 1))
    torch.testing.assert_close(wanted, teacher(batch[:, :-1]).flatten(0, 1))
    assert hidden[0].requires_grad and not hidden[1].requires_grad and not wanted.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def trained(seed: int = 0, **options) -> dict[str, torch.Tensor]:
    student = student_lab.from_teacher(tiny_model(), 1)
    loss = options.pop("loss", student_lab.taught(tiny_model(), cross_entropy))
    student_lab.train_student(student, STREAM, loss, 5, seed, **options)
    assert not student.training
    return student.state_dict()


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_training_is_decided_by_its_seed_whether_it_is_shown_or_not(capsys):
    usual = trained()
    assert capsys.readouterr().err == ""
    assert same(usual, trained(show=True)) and not same(usual, trained(seed=1))
    assert "5/5" in capsys.readouterr().err
    assert not same(usual, student_lab.from_teacher(tiny_model(), 1).state_dict())


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(student_lab, "SAVE_EVERY", 2)
    usual, state = trained(), tmp_path / "run.pt"
    calls = []

    def dies(student, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return student_lab.taught(tiny_model(), cross_entropy)(student, batch)

    with pytest.raises(KeyboardInterrupt):
        trained(loss=dies, state=state, purpose="one")
    with pytest.raises(CheckpointError, match="other purpose"):
        trained(state=state, purpose="another")
    with pytest.raises(CheckpointError, match="other purpose"):  # the same run from another start
        student_lab.train_student(tiny_model(2, layers=1), STREAM, train.next_token_loss, 5, state=state, purpose="one")
    assert state.exists() and same(usual, trained(state=state, purpose="one")) and not state.exists()


def test_a_student_is_trained_once_in_a_lab(lab):
    def start():
        return student_lab.from_teacher(lab.model(), 1)

    alone = student_lab.student(lab, "alone", start, None, 2, 0)
    assert student_lab.student(lab, "alone", start, None, 2, 0) is alone
    other = student_lab.student(lab, "taught", start, cross_entropy, 2, 0)
    assert not same(alone.state_dict(), other.state_dict())
    expected = start()
    student_lab.train_student(expected, lab.train_stream, train.next_token_loss, 2)
    assert same(alone.state_dict(), expected.state_dict())


def test_accuracy_and_block_weights_count():
    model, batch = tiny_model(), tokens(20, 9)
    expected = (model(batch)[:, :-1].argmax(-1) == batch[:, 1:]).double().mean().item()
    assert student_lab.accuracy(model, batch) == pytest.approx(expected)
    assert student_lab.block_weights(model) == sum(p.weight.numel() for p in surgery.linears(model).values())
