"""The training engine in real processes: how a batch is split, over rows, ranks or ZeRO stages, can't be seen in it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.weights.fresh import create_model
from tests.pipeline import replay_ranks, sums_ranks, train_ranks
from tests.pipeline.rank_processes import run_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_model("tiny", 0, tmp_path_factory.mktemp("model") / "tiny")


def train(
    model: Path,
    out: Path,
    *,
    ranks: int = 1,
    zero: int = 1,
    tokens: int = 4096,
    loss: str = "grpo",
    checkpointing: bool = False,
) -> dict:
    """Three updates in `ranks` processes; returns the trace that rank 0 wrote."""
    run_ranks(train_ranks.main, ranks, out.parent, model, out, zero, tokens, loss, int(checkpointing))
    return dict(np.load(out))


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(model, tmp_path_factory.mktemp("plain") / "trace.npz")


def assert_same(trace: dict, other: dict) -> None:
    np.testing.assert_allclose(trace["losses"], other["losses"], rtol=2e-5)
    np.testing.assert_allclose(trace["grad_norms"], other["grad_norms"], rtol=2e-4)
    np.testing.assert_allclose(trace["weights"], other["weights"], atol=2e-5)


@pytest.mark.parametrize(("tokens", "checkpointing"), [(16, False), (90, True)])
def test_many_small_rows_are_one_large_row(
    model: Path, plain: dict, tmp_path: Path, tokens: int, checkpointing: bool
) -> None:
    trace = train(model, tmp_path / "trace.npz", tokens=tokens, checkpointing=checkpointing)
    assert trace["rows"] > plain["rows"]
    assert_same(trace, plain)


@pytest.mark.parametrize(("ranks", "zero"), [(2, 1), (2, 3), (2, 0), (1, 2)])
def test_ranks_and_zero_stages_agree(model: Path, plain: dict, tmp_path: Path, ranks: int, zero: int) -> None:
    assert_same(train(model, tmp_path / "trace.npz", ranks=ranks, zero=zero), plain)


def test_balance_does_not_see_the_split(model: Path, tmp_path: Path) -> None:
    """The load is counted over all ranks and micro-batches: the bias, which is among the weights, moves alike. It is
    saved: else a reload would not repeat the third update, which routes by it."""
    whole = train(model, tmp_path / "whole.npz", loss="balanced")
    split = train(model, tmp_path / "split.npz", loss="balanced", ranks=2, zero=3, tokens=16, checkpointing=True)
    assert_same(split, whole)
    steps = whole["biases"] / 0.05
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    assert 1 <= np.abs(steps).max().round() <= 3
    np.testing.assert_allclose(split["biases"], whole["biases"], atol=1e-6)


@pytest.fixture(scope="module")
def sums(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """Gradients by case, on one rank and on two, of weights that are numbers of bfloat16."""
    folder = tmp_path_factory.mktemp("sums")
    rounded = create_model("tiny", 0, folder / "tiny")
    tensors = load_file(rounded / "model.safetensors")
    save_file({name: x.bfloat16().to(x.dtype) for name, x in tensors.items()}, rounded / "model.safetensors")
    results = []
    for ranks in (1, 2):
        out = folder / f"{ranks}.npz"
        run_ranks(sums_ranks.main, ranks, folder, rounded, out)
        results.append(dict(np.load(out)))
    return results


def distance(gradient: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(gradient - other) / np.linalg.norm(other))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_of_weights_in_bfloat16_are_summed_in_float32(sums: list[dict[str, np.ndarray]], zero: int) -> None:
    """Sixteen equal rows are one row, exactly: sums in bfloat16 differ by 8e-3. And 48 rows on one rank or on two are
    as near to float32 as one row, after a sleep too; with sums in bfloat16 they are further off."""
    one_row, reference = sums[0]["one row"], sums[0]["float32"]
    for gradients in sums:
        assert distance(gradients[f"{zero}/same"], one_row) < 1e-6
        assert distance(gradients[f"{zero}/rows"], reference) < 1.05 * distance(one_row, reference)


def test_groups_that_are_cut_have_the_gradient_of_whole_ones(sums: list[dict[str, np.ndarray]]) -> None:
    for gradients in sums:
        assert distance(gradients["cut groups"], sums[0]["groups"]) < 1e-6


def test_the_trace_can_tell(model: Path, plain: dict, tmp_path: Path) -> None:
    """The comparison above would fail if the loss differed: supervised training gives another trace."""
    other = train(model, tmp_path / "trace.npz", loss="sft")
    with pytest.raises(AssertionError):
        assert_same(other, plain)


def test_routes_of_the_old_policy_are_kept_through_its_updates(model: Path, tmp_path: Path) -> None:
    run_ranks(replay_ranks.main, 1, tmp_path, model)
