"""Training: the schedule, the optimizers' shares, and a run that survives being killed bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitfm import evaluate
from minitfm.checkpoint import CheckpointError
from minitfm.train import Settings, make_optimizers, train, zero_residual_outputs
from tests.minitfm.models import tiny_config, tiny_model, tokens

STREAM = tokens(600, vocabulary=7)
SETTINGS = Settings(steps=8, batch=2, length=9, validate_every=3)


class Killed(Exception):
    """Stands in for a signal."""


def kill_after(step):
    def progress(now):
        if now.step == step:
            raise Killed

    return progress


def trained(settings, **options):
    model = tiny_model(seed=3)
    history = train(model, STREAM, settings, **options)
    return model, history


def assert_same(model, other):
    for (name, tensor), (_, reference) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(tensor, reference), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("killed", [1, 4, 5, 7])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, optimizer, killed):
    validation = tokens(3, 9, vocabulary=7, seed=1)
    settings = replace(SETTINGS, optimizer=optimizer)
    whole, history = trained(settings, validation=validation)
    settings = replace(settings, save_every=2, state=tmp_path / "resume.pt")
    model = tiny_model(seed=3)
    with pytest.raises(Killed):
        train(model, STREAM, settings, validation=validation, progress=kill_after(killed))
    steps = []
    model = tiny_model(seed=99)  # all comes from the state file, of step 0 too; the kill comes before a step's save
    found = train(model, STREAM, settings, validation=validation, progress=lambda now: steps.append(now.step))
    assert steps[0] == (killed - 1) // 2 * 2 + 1
    assert_same(model, whole)
    assert found == history and [step for step, _ in history] == [3, 6, 8]
    assert not settings.state.exists()


def test_a_loss_that_draws_random_numbers_resumes_too(tmp_path):
    def loss(model, batch):
        return (evaluate.nll(model, batch) * torch.rand(2, 8)).mean()

    torch.manual_seed(5)
    whole, _ = trained(SETTINGS, loss=loss)
    settings = replace(SETTINGS, save_every=2, state=tmp_path / "resume.pt")
    torch.manual_seed(5)
    with pytest.raises(Killed):
        trained(settings, loss=loss, progress=kill_after(5))
    torch.manual_seed(6)
    resumed, _ = trained(settings, loss=loss)
    assert_same(resumed, whole)


def test_the_seed_decides_the_run():
    first, _ = trained(SETTINGS)
    again, _ = trained(SETTINGS)
    assert_same(first, again)
    other, _ = trained(replace(SETTINGS, seed=1))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_learns(optimizer):
    pattern = torch.arange(300) % 5
    model = tiny_model(seed=3)
    sequences = pattern[:60].view(6, 10)
    before = evaluate.mean_nll(model, sequences)
    history = train(model, pattern, Settings(steps=100, batch=4, length=10, optimizer=optimizer), validation=sequences)
    assert before > 2
    assert history == [(100, evaluate.mean_nll(model, sequences))]
    assert history[0][1] < math.log(5) / 4  # guessing one of the five costs log(5)


def test_a_student_trains_on_a_loss_of_its_own_and_what_follows_a_step_stays():
    mask = (tokens(16, 16, seed=5) % 2).float()
    seen = []

    def loss(model, batch):
        seen.append(tuple(batch.shape))
        return model(batch).square().mean()

    def after_step(step, model):
        model.blocks[0].attention.q_proj.weight.data *= mask

    model, history = trained(SETTINGS, loss=loss, after_step=after_step)
    assert seen == [(2, 9)] * 8 and history == []
    assert (model.blocks[0].attention.q_proj.weight[mask == 0] == 0).all()
    assert (model.blocks[0].attention.q_proj.weight[mask == 1] != 0).all()
    assert model(tokens(1, 9)).square().mean() < tiny_model(seed=3)(tokens(1, 9)).square().mean()


def test_every_step_sees_other_tokens_and_the_same_ones_again():
    runs = []
    for _ in range(2):
        batches = []

        def loss(model, batch, batches=batches):
            batches.append(tuple(batch.flatten().tolist()))
            return evaluate.nll(model, batch).mean()

        trained(SETTINGS, loss=loss)
        runs.append(batches)
    assert runs[0] == runs[1] and len(set(runs[0])) == 8


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_is_as_large_as_the_schedule_says(optimizer):
    model, before = tiny_model(), tiny_model()
    settings = Settings(steps=10, warm_up=0.5, weight_decay=0.0, optimizer=optimizer, batch=2, length=9)
    with pytest.raises(Killed):
        train(model, STREAM, settings, progress=kill_after(1))
    change = (model.norm.weight - before.norm.weight).abs()
    torch.testing.assert_close(change, torch.full((16,), 3e-3 / 5), rtol=1e-3, atol=0)  # Adam's first step is the rate
    name = "blocks.0.feed_forward.up_proj.weight"  # [24, 16]
    largest = torch.linalg.matrix_norm(model.get_parameter(name) - before.get_parameter(name), ord=2).item()
    if optimizer == "muon":  # its polynomial brings the largest singular value to between 0.7 and 1.2
        assert 0.7 < largest / (0.03 * (24 / 16) ** 0.5 / 5) < 1.2


def test_progress_tells_what_happened():
    reports = []
    _, history = trained(SETTINGS, validation=tokens(2, 9), progress=reports.append)
    assert [now.step for now in reports] == list(range(1, 9))
    assert [now.step for now in reports if now.validated] == [3, 6, 8]
    assert reports[-1].history == history and len(reports[3].history) == 1
    assert all(now.loss > 0 for now in reports)
    assert [now.seconds for now in reports] == sorted(now.seconds for now in reports)


def test_steps_train_and_validation_evaluates_and_the_mode_is_left_as_it_was():
    for mode in (True, False):
        modes = []
        model = tiny_model().train(mode)
        model.register_forward_pre_hook(lambda module, _, modes=modes: modes.append(module.training))
        train(model, STREAM, SETTINGS, validation=tokens(2, 9))
        assert model.training == mode
        step, validation = True, False
        assert modes == [step] * 3 + [validation] + [step] * 3 + [validation] + [step] * 2 + [validation]


@given(
    steps=st.integers(1, 200),
    warm_up=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(steps, warm_up, schedule):
    settings = Settings(steps=steps, warm_up=warm_up, schedule=schedule)
    rates = [settings.rate(step) for step in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if schedule == "constant" or warm_up == 1:
        assert rates[-1] == 1
    elif steps > 40:
        assert rates[-1] < 0.05 + 1 / steps


def test_muon_gets_the_matrices_of_the_blocks_and_decay_spares_the_rest():
    model = tiny_model()
    muon, adamw = make_optimizers(model, Settings())
    matrices = {id(p) for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == matrices
    rest = {id(p) for p in model.parameters()} - matrices
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == rest
    (only,) = make_optimizers(model, Settings(optimizer="adamw", weight_decay=0.2))
    decay = {id(p): group["weight_decay"] for group in only.param_groups for p in group["params"]}
    assert {key for key, value in decay.items() if value == 0.2} == matrices
    assert {key for key, value in decay.items() if value == 0} == rest


def test_another_optimizer_is_given_the_peak_rate_of_its_groups():
    model, rates = tiny_model(), []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    def optimizers(model, settings):
        return [Watched([{"params": model.parameters(), "peak": 0.5}], lr=1.0)]

    before, settings = model.embedding.weight.clone(), Settings(steps=3, batch=2, length=16)
    train(model, tokens(600), settings, optimizers=optimizers)
    assert rates == [0.5 * settings.rate(step) for step in range(3)]
    assert torch.equal(model.embedding.weight, before)


def test_frozen_parameters_stay():
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, STREAM, SETTINGS)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {name for name in before if name.startswith(("blocks.1.", "norm."))}


def test_any_part_can_be_trained_alone_but_not_none():
    for prefix in ("blocks.", "norm."):
        model = tiny_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(prefix) and parameter.dim() == (2 if prefix == "blocks." else 1))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train(model, STREAM, SETTINGS)
        assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing to train"):
        train(tiny_model().requires_grad_(False), STREAM, SETTINGS)


def test_zeroed_outputs_make_every_block_the_identity():
    model = tiny_model()
    zero_residual_outputs(model)
    x = torch.randn(2, 5, 16)
    cos, sin = model.cos[:5], model.sin[:5]
    assert all(torch.equal(block(x, cos, sin, None), x) for block in model.blocks)
    assert model.blocks[0].attention.q_proj.weight.abs().min() > 0


def test_a_state_of_another_run_is_refused(tmp_path):
    settings = replace(SETTINGS, save_every=2, state=tmp_path / "resume.pt")
    with pytest.raises(Killed):
        train(tiny_model(), STREAM, settings, progress=kill_after(3))
    kept = settings.state.read_bytes()
    with pytest.raises(CheckpointError, match="belongs to a run with other learning_rate, seed: remove it"):
        train(tiny_model(), STREAM, replace(settings, seed=7, learning_rate=1e-4))
    with pytest.raises(CheckpointError, match="other purpose"):
        train(tiny_model(), STREAM, replace(settings, purpose="another loss"))
    with pytest.raises(CheckpointError, match="other data"):
        train(tiny_model(), STREAM.flip(0), settings)
    with pytest.raises(CheckpointError, match="other config"):
        train(tiny_model(kv_heads=4), STREAM, settings)
    assert settings.state.read_bytes() == kept


@pytest.mark.parametrize("damage", [lambda b: b[:2000], lambda b: b"", lambda b: b"no zip file", lambda b: b[:-30]])
def test_a_damaged_state_is_refused_before_the_model_changes(tmp_path, damage):
    settings = replace(SETTINGS, save_every=2, state=tmp_path / "resume.pt")
    with pytest.raises(Killed):
        train(tiny_model(), STREAM, settings, progress=kill_after(3))
    settings.state.write_bytes(damage(settings.state.read_bytes()))
    model = tiny_model()
    with pytest.raises(CheckpointError, match="is not a training state or is damaged: remove it"):
        train(model, STREAM, settings)
    assert_same(model, tiny_model())


def test_divergence_is_an_error_that_names_the_step():
    def loss(model, batch):
        return evaluate.nll(model, batch).mean() * float("nan")

    with pytest.raises(FloatingPointError, match="training diverged: the loss is nan at step 0"):
        trained(SETTINGS, loss=loss)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2"),
        ({"optimizer": "sgd"}, "optimizer must be one of .*got 'sgd'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"muon_learning_rate": float("nan")}, "muon_learning_rate must be positive"),
        ({"warm_up": 1.5}, "0 <= warm_up <= 1"),
        ({"validate_every": -1}, "cannot be negative"),
    ],
)
def test_senseless_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize(("length", "size"), [(34, 600), (9, 8)])
def test_sequences_that_do_not_fit_are_refused(length, size):
    words = f"length {length} is too long: {size} tokens of text, a context of {tiny_config().context}"
    with pytest.raises(ValueError, match=words):
        train(tiny_model(), STREAM[:size], replace(SETTINGS, length=length))
