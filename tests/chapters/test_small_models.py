"""Small models: their size, and that a training run is a function of its setting also where a layer draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from chapters import lab
from chapters.shared import small_models
from minitfm import train
from minitfm.config import Config
from minitfm.model import FeedForward


@dataclass(frozen=True)
class Dropping:
    """A seam whose layers draw in training."""

    rate: float = 0.5

    def __call__(self, config: Config, layer: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(self.rate), FeedForward(config))


@pytest.fixture
def small(monkeypatch, tmp_path) -> lab.Lab:
    """The base model, and random text, so that none is read; what is trained is kept in a folder of the test."""
    monkeypatch.setattr(small_models, "cache_folder", lambda: tmp_path)
    made = lab.Lab()
    made.streams = torch.randint(2048, (2, 3000), generator=torch.Generator().manual_seed(0)).unbind()
    return made


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_a_small_model_has_half_the_width(small):
    config = small_models.small(small.config)
    assert (config.dim, config.hidden_dim, config.head_dim, config.layers) == (64, 128, 16, 4)
    odd = small_models.small(replace(small.config, head_dim=2, hidden_dim=2))
    assert odd.head_dim == 2 and odd.hidden_dim == 1


def test_the_seed_decides_what_layers_draw_and_a_run_leaves_the_random_state_alone(small, tmp_path):
    before = torch.get_rng_state()
    first = small_models.fresh(small, Dropping(), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    small.kept.clear()
    next(tmp_path.iterdir()).unlink()
    assert torch.equal(weights(first), weights(small_models.fresh(small, Dropping(), 2)))
    assert not torch.equal(weights(first), weights(small_models.fresh(small, Dropping(0.4), 2)))


def test_a_killed_run_ends_as_one_that_was_not(small, tmp_path, monkeypatch):
    def kill(now: train.Progress) -> None:
        if now.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(small_models, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        small_models.fresh(small, Dropping(), 4, progress=kill)
    assert [path.suffix for path in tmp_path.iterdir()] == [".state"]
    steps = []
    resumed = small_models.fresh(small, Dropping(), 4, progress=lambda now: steps.append(now.step))
    assert steps == [3, 4]
    small.kept.clear()
    next(tmp_path.iterdir()).unlink()
    assert torch.equal(weights(resumed), weights(small_models.fresh(small, Dropping(), 4)))


def test_the_code_of_chapters_is_part_of_a_key_and_what_measures_is_not():
    assert small_models.sources({"torch", "chapters.lab"}) == set()
    (own,) = small_models.sources({"chapters.shared.small_models"})
    assert "def sources" in own
