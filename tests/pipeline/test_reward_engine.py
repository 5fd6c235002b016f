"""Reward models in real training processes: how a batch is split can't be seen in it, and what is trained, saved and
scored is one model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.models.score import load_score_model
from tests.pipeline.rank_processes import run_ranks
from tests.pipeline.reward_ranks import comparisons, main
from tests.pipeline.small_models import FAMILIES, small_causal_lm

pytestmark = pytest.mark.ranks

Trace = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {family: small_causal_lm(family, home / family) for family in FAMILIES}


def train(out: Path, *models: Path, ranks: int = 1, zero: str = "1", tokens: int = 4096) -> list[Trace]:
    """Three updates of each model in `ranks` processes; returns the trace of the first at each ZeRO stage."""
    run_ranks(main, ranks, out, out, zero, tokens, *models)
    return [dict(np.load(out / f"{models[0].name}-{stage}.npz")) for stage in zero.split(",")]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    """All families trained in one row on one rank: the folder, and the first one's trace."""
    out = tmp_path_factory.mktemp("plain")
    return out, train(out, *models.values())[0]


@pytest.mark.parametrize(("ranks", "zero", "tokens"), [(1, "2", 30), (2, "0,3", 60)])
def test_rows_ranks_and_zero_stages_agree(
    models: dict[str, Path], plain: tuple[Path, Trace], tmp_path: Path, ranks: int, zero: str, tokens: int
) -> None:
    for trace in train(tmp_path, models[FAMILIES[0]], ranks=ranks, zero=zero, tokens=tokens):
        assert trace["rows"] > plain[1]["rows"]
        np.testing.assert_allclose(trace["steps"], plain[1]["steps"], rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(trace["weights"], plain[1]["weights"], atol=2e-5)
        np.testing.assert_allclose(trace["scores"], plain[1]["scores"], atol=1e-4)  # all weights' rounding at once


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
