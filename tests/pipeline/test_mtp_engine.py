"""Modules for multi-token prediction in real training processes: they learn to guess what the model will say, on any
number of ranks, and the checkpoint that is left has them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rollout.checkpoint import checkpoint_shapes, mtp_depth

from . import mtp_ranks
from .rank_processes import run_ranks
from .small_models import load_with_mtp, small_causal_lm

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_causal_lm("deepseek_v3", tmp_path_factory.mktemp("models") / "without")


def train(
    model: Path, out: Path, *, ranks: int, zero: int, tokens: int, updates: int, experts: int = 1
) -> dict[str, np.ndarray]:
    run_ranks(mtp_ranks.main, ranks, out.parent, model, out, zero, tokens, updates, experts)
    return dict(np.load(out.with_suffix(".npz")))


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("one") / "hf"
    return out, train(model, out, ranks=1, zero=1, tokens=4096, updates=30)


def test_acceptance_rises(trained: tuple[Path, dict[str, np.ndarray]]) -> None:
    _, ahead, accepted, _ = trained[1]["steps"].T
    assert accepted[:3].mean() < 0.2 and accepted[-3:].mean() > 0.6
    assert ahead[-3:].mean() < 0.5 * ahead[0]


def test_the_checkpoint_has_the_modules_and_a_sync_leaves_them_out(
    trained: tuple[Path, dict[str, np.ndarray]], model: Path
) -> None:
    folder, trace = trained
    assert mtp_depth(model) == 0 and mtp_depth(folder) == 1
    assert checkpoint_shapes(folder) == checkpoint_shapes(model)
    assert set(trace["sent"].tolist()) == set(checkpoint_shapes(model))
    held = load_file(folder / "model.safetensors")
    assert torch.equal(held["model.layers.4.embed_tokens.weight"], held["model.embed_tokens.weight"])
    causal_lm, (layer,) = load_with_mtp(folder, 1)
    assert torch.equal(layer.eh_proj.weight, held["model.layers.4.eh_proj.weight"])
    assert torch.equal(causal_lm.get_input_embeddings().weight, held["model.embed_tokens.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "experts"), [(3, 1), (1, 2), (3, 2)])
def test_ranks_that_share_the_weights_agree_with_one(
    trained: tuple[Path, dict[str, np.ndarray]], model: Path, tmp_path: Path, zero: int, experts: int
) -> None:
    """ZeRO-3 shares out all weights, expert parallelism the experts, the modules' own among them."""
    trace = train(model, tmp_path / "hf", ranks=2, zero=zero, tokens=16, updates=3, experts=experts)
    np.testing.assert_allclose(trace["steps"], trained[1]["steps"][:3], rtol=2e-4, atol=1e-5)
    assert set(trace["sent"].tolist()) == set(trained[1]["sent"].tolist())
    assert mtp_depth(tmp_path / "hf") == 1
