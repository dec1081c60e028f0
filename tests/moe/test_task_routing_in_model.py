"""Task routing in a model: what is extracted gives the logits of the mixture, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chapters.moe import task_routing
from chapters.moe.task_routing import TaskMixture, TaskRouter, extract, set_task
from chapters.shared import moe_lab
from minitfm import checkpoint
from minitfm.config import Config
from minitfm.model import Transformer
from minitfm.tokenizer import Tokenizer
from tests.conftest import tolerance


def small_model(k: int = 2, activation: str = "swiglu", tied: bool = True, vocabulary: int = 31) -> Transformer:
    """Two layers, three tasks, five experts, and routers that are sure of themselves; float64."""
    config = Config(vocabulary, 16, 24, 2, 2, context=16, activation=activation, tied_embeddings=tied)
    torch.manual_seed(k)
    model = Transformer(config, feed_forward=TaskMixture(3, 5, k)).double().eval()
    for module in model.modules():
        if isinstance(module, TaskRouter):
            torch.nn.init.normal_(module.scores)
    return model


TOKENS = torch.arange(48).view(3, 16) % 31


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(("activation", "tied"), [("swiglu", True), ("relu", False)])
def test_the_extracted_model_gives_the_logits_of_the_mixture(k, activation, tied):
    model = small_model(k, activation, tied)
    for task in range(3):
        part = extract(model, task)
        wanted = set_task(model, task)(TOKENS)
        torch.testing.assert_close(part(TOKENS), wanted, **tolerance(torch.float64, 32))
        assert part.config.hidden_dim == 24 // k * k
        assert part.num_parameters() < model.num_parameters()
    before = extract(model, 0)(TOKENS)
    assert not torch.equal(before, extract(model, 1)(TOKENS))


def test_what_is_counted():
    """Of five experts of half the width two stay, and no router: in two layers."""
    model = small_model(2)
    gone = 2 * (3 * 3 * 12 * 16 + 3 * 5)
    assert model.num_parameters() - extract(model, 0).num_parameters() == gone


def test_extracting_copies_and_changes_nothing():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    part = extract(model, 1)
    with torch.no_grad():
        for weight in part.parameters():
            weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_extracted_model_is_saved_as_any_other(tmp_path):
    part = extract(small_model(vocabulary=260).float(), 2)
    folder = tmp_path / "task"
    checkpoint.save(folder, part, Tokenizer.train(["abc"], 258))
    assert torch.equal(checkpoint.load(folder).model(TOKENS), part(TOKENS))


def test_tasks_of_tokens_in_one_batch_do_not_disturb_each_other():
    model = small_model()
    tasks = torch.tensor([0, 1, 2])[:, None].expand(3, 16)
    together = set_task(model, tasks)(TOKENS)
    for task in range(3):
        alone = set_task(model, task)(TOKENS[task : task + 1])
        torch.testing.assert_close(together[task : task + 1], alone, **tolerance(torch.float64, 32))


def test_training_reaches_the_tasks_own_experts_and_scores_only():
    model = small_model().train()
    size = model.config.vocab_size
    task_routing.task_loss(model, TOKENS + size).backward()
    for block in model.blocks:
        layer = block.get_submodule("feed_forward")
        scores = layer.get_submodule("router").scores
        assert scores.grad[1].abs().sum() > 0 and (scores.grad[[0, 2]] == 0).all()
        chosen = set(scores[1].topk(2).indices.tolist())
        assert {e for e, one in enumerate(layer.experts) if one.up_proj.weight.grad is not None} == chosen


def test_a_model_without_tasks_reads_marked_text_as_it_is():
    torch.manual_seed(0)
    model = Transformer(Config(31, 16, 24, 2, 2, context=16))
    found = [task_routing.task_loss(model, TOKENS + 31 * task).item() for task in range(3)]
    assert found[0] == found[1] == found[2]


@given(st.integers(-5, 8))
def test_a_model_refuses_a_task_that_it_does_not_know(task):
    model = MODEL
    if 0 <= task < 3:
        set_task(model, task)
        return
    for refused in (task, torch.tensor([[0, task]])):
        with pytest.raises(ValueError, match=f"task must be from 0 to 2, got {task}"):
            set_task(model, refused)
    with pytest.raises(ValueError, match="task must be from 0 to 2"):
        extract(model, task)


MODEL = small_model()


def test_what_cannot_be_extracted_or_built_is_refused():
    config = Config(31, 16, 24, 2, 2, context=16)
    with pytest.raises(ValueError, match="MoE with a TaskRouter, got a FeedForward"):
        extract(Transformer(config), 0)
    with pytest.raises(ValueError, match="MoE with a TaskRouter, got a MoE"):
        extract(Transformer(config, feed_forward=moe_lab.Mixture(task_routing.Gate())), 0)
    for tasks, experts, k in ((0, 4, 1), (3, 4, 5), (3, 4, 0), (3, 40, 25)):
        with pytest.raises(ValueError, match="need tasks >= 1 and 1 <= k <= experts"):
            TaskMixture(tasks, experts, k)(config, 0)
    with pytest.raises(ValueError, match="task was set for 3 tokens, got 48"):
        set_task(small_model(), torch.zeros(1, 3, dtype=torch.int64))(TOKENS)
