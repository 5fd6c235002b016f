"""Reward models in real training processes: how a batch is split can't be seen in it, and what is trained, saved and
scored is one model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.weights.fresh import create_model
from pipeline.weights.reward_model import load_score_model
from rollout.checkpoint import checkpoint_shapes
from tests.pipeline.rank_processes import run_ranks
from tests.pipeline.reward_ranks import comparisons, main
from tests.pipeline.small_models import FAMILIES, small_causal_lm

pytestmark = pytest.mark.ranks

Trace = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {family: small_causal_lm(family, home / family) for family in FAMILIES}


def train(
    out: Path, *models: Path, ranks: int = 1, zero: str = "1", tokens: int = 4096, experts: int = 1
) -> list[Trace]:
    """Three updates of each model in `ranks` processes; returns the trace of the first at each ZeRO stage."""
    run_ranks(main, ranks, out, out, zero, tokens, experts, *models)
    return [dict(np.load(out / f"{models[0].name}-{stage}.npz")) for stage in zero.split(",")]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    """All families trained in one row on one rank: the folder, and the first one's trace."""
    out = tmp_path_factory.mktemp("plain")
    return out, train(out, *models.values())[0]


def assert_same(trace: Trace, other: Trace) -> None:
    assert trace["rows"] > other["rows"]
    np.testing.assert_allclose(trace["steps"], other["steps"], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(trace["weights"], other["weights"], atol=2e-5)
    np.testing.assert_allclose(trace["scores"], other["scores"], atol=3e-4)  # all weights' rounding at once


@pytest.mark.parametrize(("ranks", "zero", "tokens", "experts"), [(1, "2", 30, 1), (2, "0,3", 60, 1), (2, "3", 60, 2)])
def test_rows_ranks_zero_stages_and_spread_experts_agree(
    models: dict[str, Path], plain: tuple[Path, Trace], tmp_path: Path, ranks: int, zero: str, tokens: int, experts: int
) -> None:
    traces = train(tmp_path, models[FAMILIES[0]], ranks=ranks, zero=zero, tokens=tokens, experts=experts)
    for stage, trace in zip(zero.split(","), traces, strict=True):
        assert_same(trace, plain[1])
        shapes = [
            checkpoint_shapes(folder / f"{FAMILIES[0]}-{of}") for folder, of in ((tmp_path, stage), (plain[0], 1))
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_spread_experts_of_deepseek_v2_train_as_on_one_rank(tmp_path: Path) -> None:
    model = create_model("tiny_v2", 0, tmp_path / "v2")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    [one] = train(tmp_path / "one", model)
    [two] = train(tmp_path / "two", model, ranks=2, tokens=60, experts=2)
    assert_same(two, one)


def test_it_learns_the_order(plain: tuple[Path, Trace]) -> None:
    losses, margins, _ = plain[1]["steps"].T
    assert losses[2] < losses[0] and margins[2] > margins[0]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_scores_as_transformers_does_what_it_saved(
    plain: tuple[Path, Trace], family: str, padding_side: str
) -> None:
    folder, expected = plain[0] / f"{family}-1", np.load(plain[0] / f"{family}-1.npz")["scores"]
    load_score_model(folder, "float32")  # whole
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    ids = [tree.root_ids + branch.token_ids for tree in comparisons() for branch in tree.branches]
    assert np.ptp(expected) > 1e-2
    for batch_size in (1, 8):
        scores: list[float] = []
        for start in range(0, len(ids), batch_size):
            batch = tokenizer.pad({"input_ids": ids[start : start + batch_size]}, return_tensors="pt")
            with torch.no_grad():
                scores += model(**batch).logits[:, 0].tolist()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
