"""Processes killed in the middle of a GRPO stage, as the kernel kills: the series is that of an unharmed one."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.run.stage import run_stage
from pipeline.train.worker import TrainingRanks
from pipeline.weights.fresh import create_model
from rollout.pool import RolloutPool
from rollout.types import Group
from tests.pipeline.test_reference import config_of
from tests.series import series

pytestmark = [pytest.mark.engine, pytest.mark.ranks, pytest.mark.slow]

REPLACEMENT = ("rollout/replaced_engines", "rollout/continued_tokens", "rollout/restarted_completions")


def process_id(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def run(home: Path, name: str) -> list[dict[str, float]]:
    config = config_of(
        home,
        steps=5,
        optimizer={"learning_rate": 2e-2},
        trainer={"threads": 1, "num_ranks": 2},
        checkpoint={"every_steps": 1},
        rollout={"max_model_len": 32, "threads": 1, "num_engines": 2},
    )
    run_stage(config, home / name)
    return series(home / name / "metrics.jsonl", "reward_pool/")


@pytest.mark.timeout(1500)
def test_the_series_is_that_of_an_unharmed_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine dies while it generates the second step, and is replaced within it; a rank dies in the update of the
    fourth, and the stage starts again from the third."""
    create_model("tiny", 0, tmp_path / "lm")
    unharmed = run(tmp_path, "unharmed")
    capsys.readouterr()
    groups, forward_backward = RolloutPool.groups, TrainingRanks.forward_backward
    requests, updates = [0], [0]

    def killed_groups(self: RolloutPool, ticket: int) -> Iterator[Group]:
        requests[0] += 1
        if requests[0] == 2:
            pid = process_id(self._engines[1])
            self._turn(0.0)
            assert self._queue.is_busy(1)
            os.kill(pid, signal.SIGKILL)
        return groups(self, ticket)

    def killed_update(self: TrainingRanks, *args: Any) -> Any:
        updates[0] += 1
        if updates[0] == 4:
            os.kill(process_id(self._ranks[1]), signal.SIGKILL)
        return forward_backward(self, *args)

    monkeypatch.setattr(RolloutPool, "groups", killed_groups)
    monkeypatch.setattr(TrainingRanks, "forward_backward", killed_update)
    harmed = run(tmp_path, "harmed")
    assert "a training rank died in 'forward_backward'" in (output := capsys.readouterr().out)
    assert "restart 1 of 2" in output
    assert harmed[1]["rollout/replaced_engines"] == 1 and harmed[2]["rollout/replaced_engines"] == 1
    assert [{key: row[key] for key in row if key not in REPLACEMENT} for row in harmed] == unharmed
