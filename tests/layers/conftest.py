"""Tiny random models of every family, and their compressed counterparts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flatllmcore.utils.loading import load_config

from .published import COMMON, PUBLISHED
from .tiny_models import KINDS, SIZES, compress, dense_model_of, random_model


@pytest.fixture(params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dense_model(family: str) -> Callable[..., PreTrainedModel]:
    """Return a maker of dense random models; its arguments replace fields of the config."""
    return lambda **fields: dense_model_of(family, **fields)


@pytest.fixture
def flat_model(family: str) -> Callable[..., PreTrainedModel]:
    """Return a maker of compressed random models; its arguments replace fields of the dense config."""
    return lambda **fields: compress(dense_model_of(family, **fields))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """A random model in float64, by the road a checkpoint takes."""
    (tmp_path / "config.json").write_text(json.dumps(COMMON | PUBLISHED[request.param]))
    return random_model(load_config(str(tmp_path))).double()
