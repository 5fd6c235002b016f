"""A reference that follows the policy: which one a step has, what is kept on the disk, and a stage that resumes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from configs.grpo import GRPOConfig
from pipeline.cluster.room import cluster
from pipeline.grpo.reference import reference_checkpoint, reference_step, refresh_reference
from pipeline.stages.context import Context
from pipeline.stages.grpo import launch
from pipeline.weights.fresh import create_model
from tests.series import series


def test_the_reference_of_a_step_by_hand() -> None:
    """Every 4 steps: steps 1 to 4 have the first weights, 5 to 8 the policy after step 4."""
    assert [reference_step(step, 4) for step in range(10)] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert reference_step(9, None) == 0


class Policy:
    """Weights that are the number of their step."""

    step = reference = 0

    def save_hf(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(self.step))

    def refresh_reference(self) -> None:
        self.reference = self.step


def test_a_resumed_stage_finds_the_reference_that_it_had(tmp_path: Path) -> None:
    """References after every 2 steps and training states after every 3, of which two are kept: each state that may be
    resumed from when the newest was written, after steps 6 and 9, has its reference, and no other is kept."""
    policy, model = Policy(), tmp_path / "model"
    model.mkdir()
    states = tmp_path / "checkpoints"
    used: dict[int, int] = {}
    for step in range(1, 13):
        policy.step = step
        if step % 2 == 0:
            refresh_reference(cast(Any, policy), tmp_path, step, 2)
        used[step] = policy.reference
        if step % 3 == 0:
            (states / f"step-{step}").mkdir(parents=True)
            shutil.rmtree(states / f"step-{step - 6}", ignore_errors=True)
    for newest, kept in ((12, True), (9, False)):  # the newest state, and, if that is damaged, the one before
        checkpoint = reference_checkpoint(tmp_path, model, 2)
        assert int((checkpoint / "weights").read_text()) == used[newest]
        if kept:
            shutil.rmtree(states / "step-12")
    assert sorted(path.name for path in (tmp_path / "reference").iterdir()) == ["step-12", "step-6", "step-8"]
    shutil.rmtree(tmp_path / "reference" / "step-8")
    with pytest.raises(ValueError, match="step-8' is gone; restore it"):
        reference_checkpoint(tmp_path, model, 2)
    shutil.rmtree(states / "step-9")
    assert reference_checkpoint(tmp_path, model, 2) == model


def test_the_reference_of_a_state_that_is_still_being_written_is_kept(tmp_path: Path) -> None:
    """The state after step 5 appears after the reference of step 6: it was trained with that of step 4."""
    policy, states = Policy(), tmp_path / "checkpoints"
    (states / "step-3").mkdir(parents=True)
    for step, pending in ((2, None), (4, None), (6, 5)):
        policy.step = step
        refresh_reference(cast(Any, policy), tmp_path, step, 2, pending=pending)
    assert sorted(path.name for path in (tmp_path / "reference").iterdir()) == ["step-2", "step-4", "step-6"]
    (states / "step-5").mkdir()
    assert reference_checkpoint(tmp_path, tmp_path / "model", 2).name == "step-4"


def config_of(home: Path, **changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "type": "grpo",
        "model": {"path": str(home / "lm")},
        "prompts": {"source": {"type": "sums", "size": 20}, "max_prompt_length": 16},
        "rewards": [{"name": "length", "args": {"unit": "characters", "longest": 2, "falloff": 8}}],
        "steps": 5,
        "prompts_per_step": 2,
        "group_size": 4,
        "sampling": {"max_tokens": 8, "temperature": 0.7, "top_k": 20, "top_p": 0.95},
        "objective": {"reference_every_steps": 2, "kl_coef": 0.5, "kl_target": 0.01, "entropy_target": 9.0},
        "optimizer": {"learning_rate": 3e-3},
        "trainer": {"threads": 1},
        "rollout": {"max_model_len": 32, "threads": 1, "kv_cache_gib": 0.1},
        "checkpoint": {"every_steps": 1},
    }
    return GRPOConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A language model, and in `grpo` the stage, run in a cluster that lives as long as the tests."""
    home = tmp_path_factory.mktemp("grpo")
    create_model("tiny", 0, home / "lm")
    with cluster():
        launch(config_of(home), home / "grpo", Context(Path("evaluations")))
        yield home


@pytest.mark.timeout(1500)
@pytest.mark.slow  # ranks copy weights in test_train_engine.py, and test_run.py resumes a stage
@pytest.mark.engine
@pytest.mark.ranks
def test_stopped_and_run_again_the_series_is_the_same_to_the_bit(home: Path, tmp_path: Path) -> None:
    """A folder as a kill in step 5 leaves it: the reference of that step is the policy after step 4. The divergence
    falls to rounding where the reference is the policy before the update, in steps 1, 3 and 5."""
    whole = series(home / "grpo" / "metrics.jsonl", "reward_pool/")
    divergences = [row["loss/kl_mean"] for row in whole]
    assert max(divergences[::2]) < 1e-5 and min(divergences[1::2]) > 1e-4, divergences
    assert [row["loss/kl_coef"] for row in whole][:2] == [0.5, 0.5 * (1 - 0.1 * 0.2)]  # step 1 is far below the target
    assert [row["loss/entropy_coef"] for row in whole][:3] == [0.0, 0.001, 0.002]
    folder = tmp_path / "grpo"
    shutil.copytree(home / "grpo", folder)
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / "checkpoints" / "step-5")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    figures = launch(config_of(home), folder, Context(Path("evaluations")))
    assert series(folder / "metrics.jsonl", "reward_pool/") == whole
    assert figures["loss/kl_mean"] == json.loads(lines[4])["loss/kl_mean"]
