"""A GRPO stage that samples ahead, with a real engine and a real rank: its lag, a lost engine, and how it resumes."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.stage import run_stage
from pipeline.train.worker import TrainingRanks
from pipeline.weights.fresh import create_model
from rollout.pool import RolloutPool
from tests.pipeline.test_lost import process_id
from tests.pipeline.test_reference import config_of
from tests.series import series

pytestmark = [pytest.mark.engine, pytest.mark.ranks, pytest.mark.slow]


def config(home: Path, max_lag: int) -> Any:
    """Completions of up to 64 tokens, whose kept tokens are recorded, a few at a time, so that engines need longer than
    ranks; four steps that all learn, each kept."""
    return config_of(
        home,
        steps=4,
        rewards=[{"name": "length", "args": {"unit": "characters", "longest": 2, "falloff": 200}}],
        prompts_per_step=8,
        sampling={"max_tokens": 64, "top_k": 50},
        objective={"kl_coef": 0.0, "importance_cap": 2.0, "off_policy_mask": 0.5},
        optimizer={"learning_rate": 5e-3},
        placement="separate",
        checkpoint={"every_steps": 1, "keep": 4},
        rollout={"max_model_len": 96, "threads": 1, "kv_cache_gib": 0.1, "max_num_seqs": 5, "max_lag": max_lag},
    )


@pytest.mark.timeout(3000)
def test_a_stage_that_samples_ahead_trains_survives_a_lost_engine_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine dies while the rank trains the second step. Every step then holds its tokens without lag to the bound
    of the sync, their kept tokens too, so a token of the wrong version, or without its kept tokens, would stop it."""
    create_model("tiny", 0, tmp_path / "lm")
    engines, updates = list[int](), [0]
    start, forward_backward = RolloutPool.__init__, TrainingRanks.forward_backward

    def noted_start(self: RolloutPool, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        engines.append(process_id(self._engines[0]))

    def killed_update(self: TrainingRanks, *args: Any) -> Any:
        updates[0] += 1
        if updates[0] == 2:
            os.kill(engines[0], signal.SIGKILL)
        return forward_backward(self, *args)

    monkeypatch.setattr(RolloutPool, "__init__", noted_start)
    monkeypatch.setattr(TrainingRanks, "forward_backward", killed_update)
    run_stage(config(tmp_path, 1), tmp_path / "grpo")
    rows = series(tmp_path / "grpo" / "metrics.jsonl")
    assert len(rows) == 4 and rows[-1]["rollout/replaced_engines"] == 1
    assert rows[0]["rollout/lag_max"] == 0 and rows[0]["mismatch/no_lag_rate"] == 1
    assert all(row["rollout/lag_max"] <= 1 for row in rows) and any(row["rollout/lag_mean"] > 0.2 for row in rows)
    assert any(row["rollout/several_versions_rate"] > 0 and row["rollout/carried_tokens"] > 0 for row in rows)
    assert all(row["rollout/wasted_tokens"] == 0 for row in rows)
    for row in rows:
        assert row["rollout/no_lag_rate"] == pytest.approx(row["mismatch/no_lag_rate"])
        assert row["mismatch/no_lag_abs_mean"] < 1e-5, "engine and trainer compute alike"
    folder = tmp_path / "grpo"
    shutil.rmtree(folder / "hf")
    (folder / "figures.json").unlink()
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    run_stage(config(tmp_path, 1), folder)
    resumed = series(folder / "metrics.jsonl")
    assert resumed[:2] == rows[:2] and len(resumed) == 4
    assert resumed[2]["rollout/lag_max"] == 0, "what was in flight is sampled again, by the restored weights"
    assert (folder / "hf").is_dir()
