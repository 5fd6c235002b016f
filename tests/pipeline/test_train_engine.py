"""The training engine in real processes: how a batch is split, over rows, ranks or ZeRO stages, can't be seen in it."""

import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from pipeline.models.fresh import create_model
from tests.pipeline import train_ranks

pytestmark = pytest.mark.ranks

# Ranks are forked from a process that has imported everything, which takes longer than what they do.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([train_ranks.__name__])


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
    group = {"WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = (str(model), str(out), str(zero), str(tokens), loss, str(int(checkpointing)))
    logs = [out.with_name(f"rank-{rank}.log") for rank in range(ranks)]
    processes = [
        FORKS.Process(target=be_rank, args=(group | {"RANK": str(rank)}, log, arguments))
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=240)
        assert [process.exitcode for process in processes] == [0] * ranks, [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()
    return dict(np.load(out))


def be_rank(environment: dict[str, str], log: Path, arguments: tuple[str, ...]) -> None:
    """In a process of its own: one rank, whatever it says written to `log`."""
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        train_ranks.main(*arguments)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


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


def test_the_trace_can_tell(model: Path, plain: dict, tmp_path: Path) -> None:
    """The comparison above would fail if the loss differed: supervised training gives another trace."""
    other = train(model, tmp_path / "trace.npz", loss="sft")
    with pytest.raises(AssertionError):
        assert_same(other, plain)
