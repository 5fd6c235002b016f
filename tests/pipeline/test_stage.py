"""A stage on disk, without a cluster: refusals before one starts, progress, and settings that may be corrected."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from configs.rewards import RewardSpec
from configs.stages import AnyStage, Recipe
from pipeline.cluster import start
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import stage_demand
from pipeline.disk.checksums import checksum, write_checksums
from pipeline.errors import RankLost, RunStopped
from pipeline.run import stage
from pipeline.run.lineage import write_lineage
from pipeline.run.stage import progress, run_stage
from pipeline.stages.context import Context
from rollout.actors import DataLost, EngineLost
from tests.pipeline.stage_configs import grpo, make_checkpoint, sft

HERE = Node("this machine", 2, 0, 2, 0, memory=24 * 2**30)


class Launched:
    """Stands in for a stage's launcher: counts, and raises or returns."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.errors: list[Exception] = []

    def check(self, config: AnyStage) -> None: ...

    def launch(self, config: AnyStage, folder: Path, context: Context) -> dict[str, float]:
        self.count += 1
        if self.errors:
            raise self.errors.pop()
        if self.error is not None:
            raise self.error
        return {"loss": 1.0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    launcher = Launched()
    monkeypatch.setattr(stage, "_module", lambda _: launcher)
    monkeypatch.setattr(stage, "cluster_when_needed", nullcontext)
    monkeypatch.setattr(stage, "write_html", lambda _: None)
    monkeypatch.setattr("pipeline.cluster.machine.this_machine", lambda: HERE)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return launcher


def test_a_stage_whose_rank_died_starts_again_as_often_as_its_trainer_allows(
    tmp_path: Path, model: Path, launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    launched.error = RankLost("a training rank died in 'step'")
    with pytest.raises(RankLost, match="died in 'step'"):
        run_stage(sft(model, trainer={"max_restarts": 3}), tmp_path / "run")
    assert launched.count == 4
    output = capsys.readouterr().out
    assert "a training rank died in 'step'" in output and "restart 3 of 3 (trainer.max_restarts)" in output
    launched.errors = [launched.error, EngineLost("rollout engine 0 was lost"), DataLost("lost with the node")]
    launched.error = None
    assert run_stage(sft(model, trainer={"max_restarts": 3}), tmp_path / "run") == {"loss": 1.0}
    assert launched.count == 8


def test_nodes_that_cannot_take_over_stop_the_stage_with_both_reasons(
    tmp_path: Path, model: Path, launched: Launched
) -> None:
    launched.errors = [
        ValueError("asks for 2 GPUs, the cluster has 1"),
        RankLost("a training rank died: its node died"),
    ]
    with pytest.raises(RunStopped, match="its node died\nthe nodes that are left can't run the stage: asks for 2 GPUs"):
        run_stage(sft(model, trainer={"max_restarts": 3}), tmp_path / "run")
    assert launched.count == 2


def test_a_stage_that_stops_itself_is_not_started_again(tmp_path: Path, model: Path, launched: Launched) -> None:
    launched.error = RunStopped("the gradient is not finite")
    with pytest.raises(RunStopped, match="gradient"):
        run_stage(sft(model), tmp_path / "run")
    assert launched.count == 1


def test_a_stage_that_was_refused_at_its_rows_may_be_corrected(tmp_path: Path, model: Path, launched: Launched) -> None:
    folder = tmp_path / "run"
    launched.error = ValueError("200 of 200 rows are bad")
    with pytest.raises(ValueError, match="rows are bad"):
        run_stage(sft(model), folder)
    launched.error = None
    assert run_stage(sft(model, seed=5), folder) == {"loss": 1.0}
    assert json.loads((folder / "config.json").read_text())["seed"] == 5
    with pytest.raises(ValueError, match="seed: was 5, is 6"):
        run_stage(sft(model, seed=6), folder)


def test_a_stage_that_has_made_a_step_may_not(tmp_path: Path, model: Path, launched: Launched) -> None:
    launched.error = ValueError("stopped")
    with pytest.raises(ValueError, match="stopped"):
        run_stage(sft(model), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="seed: was 0, is 5"):
        run_stage(sft(model, seed=5), tmp_path / "run")


def test_a_finished_training_is_lengthened_once(tmp_path: Path, model: Path, launched: Launched) -> None:
    recipe = Recipe.model_validate({"name": "run", "stages": {"sft": sft(model)}})
    folder, longer = tmp_path / "run" / "sft", sft(model, steps=6)
    run_stage(sft(model), folder, recipe)
    (folder / "metrics.jsonl").write_text('{"step": 4}\n')
    assert progress(sft(model), folder, recipe) == "done" and progress(longer, folder, recipe) == "lengthened"
    launched.error = RunStopped("killed")
    with pytest.raises(RunStopped):
        run_stage(longer, folder, recipe)
    assert progress(longer, folder, recipe) == "started"
    with pytest.raises(ValueError, match="steps: was 6, is 4"):
        progress(sft(model), folder, recipe)
    launched.error = None
    for _ in range(2):
        assert run_stage(longer, folder, recipe) == {"loss": 1.0} and launched.count == 3
    assert progress(longer, folder, recipe) == "done"


@pytest.mark.parametrize("content", ["", '{"loss": 1', "\0\0\0\0"])
def test_damaged_figures_do_not_end_a_stage(
    tmp_path: Path, model: Path, launched: Launched, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = Recipe.model_validate({"name": "run", "stages": {"sft": sft(model)}}), tmp_path / "run" / "sft"
    write_lineage(folder, "sft", sft(model), sft(model))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "figures.json").write_text(content)
    assert progress(sft(model), folder, recipe) == "started"
    assert run_stage(sft(model), folder, recipe) == {"loss": 1.0} and launched.count == 1
    assert "figures.json' is damaged" in capsys.readouterr().out
    assert progress(sft(model), folder, recipe) == "done"
    assert run_stage(sft(model), folder, recipe) == {"loss": 1.0} and launched.count == 1


def test_a_damaged_training_state_is_told_before_anything_starts(
    tmp_path: Path, model: Path, launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    write_lineage(folder, "run", sft(model), sft(model))
    for step in (3, 6):
        state = folder / "checkpoints" / f"step-{step}"
        state.mkdir(parents=True)
        (state / "step.json").write_text(json.dumps({"step": step}))
        write_checksums(state, {"step.json": checksum(state / "step.json")})
    (folder / "checkpoints" / "step-6" / "step.json").write_text('{"step": 600}')
    run_stage(sft(model), folder)
    output = " ".join(capsys.readouterr().out.split())
    assert "step.json is not what was written" in output and "resumes from step 3" in output
    (folder / "figures.json").unlink()
    (folder / "checkpoints" / "step-3" / "step.json").unlink()
    with pytest.raises(ValueError, match=r"step\.json is missing"):
        run_stage(sft(model), folder)
    assert launched.count == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"max_model_len": 32, "tensor_parallel_size": 2}}, r"tensor_parallel_size=2 .* set it to 1"),
        ({"rollout": {"max_model_len": 32, "kv_cache_gib": 64}}, r"rollout\.kv_cache_gib=64 .* 24\.0; lower it"),
        ({"rollout": {"max_model_len": 32, "kv_cache_gib": 13, "num_engines": 2}}, r"26 GiB of memory"),
    ],
)
def test_what_this_machine_cannot_give_is_refused_before_anything_starts(
    tmp_path: Path, model: Path, launched: Launched, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage(grpo(model, **changes), tmp_path / "run")
    assert launched.count == 0
    run_stage(grpo(model, rollout={"max_model_len": 32, "kv_cache_gib": 20}), tmp_path / "run")
    assert launched.count == 1


def test_what_a_cluster_has_is_asked_of_the_cluster(
    tmp_path: Path, model: Path, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    run_stage(grpo(model, rollout={"max_model_len": 32, "tensor_parallel_size": 2}), tmp_path / "run")
    assert launched.count == 1


def test_an_engine_keeps_to_one_machine(model: Path) -> None:
    demand = stage_demand(grpo(model, rollout={"max_model_len": 32, "tensor_parallel_size": 4}))
    assert demand.why_impossible([Node("a", 64, 4, 64, 4)]) == ""
    refused = demand.why_impossible([Node("a", 64, 2, 64, 2), Node("b", 64, 2, 64, 2)])
    assert "rollout.tensor_parallel_size=4" in refused and "set it to 2" in refused


def test_a_kv_cache_on_gpus_is_not_compared_with_the_machines_memory(model: Path) -> None:
    demand = stage_demand(grpo(model, rollout={"max_model_len": 32, "kv_cache_gib": 64}))
    assert demand.why_impossible([Node("a", 64, 1, 64, 1, memory=24 * 2**30)]) == ""


def test_a_judges_engine_is_counted(model: Path) -> None:
    judge = RewardSpec(name="self_judge", label="fair", args={"path": "judge", "kv_cache_gib": 30, "gpus": 2})
    demand = stage_demand(grpo(model, rewards=[{"name": "math"}, judge.model_dump()]))
    assert "args.gpus=2 takes 2 GPUs of one machine for each 'fair' judge" in demand.why_impossible([HERE])
    demand = stage_demand(grpo(model, rewards=[judge.model_copy(update={"args": {"kv_cache_gib": 30.0}}).model_dump()]))
    assert "args.kv_cache_gib=30 for 1 'fair' judge" in demand.why_impossible([HERE])


class Handle:
    def close(self) -> None: ...


def test_a_cluster_starts_with_the_first_handle_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def recorded() -> Iterator[None]:
        seen.append("start")
        yield
        seen.append("end")

    monkeypatch.setattr(start, "cluster", recorded)
    with pytest.raises(ValueError, match="rows"), start.cluster_when_needed(lambda: seen.append("ready")):
        raise ValueError("200 of 200 rows are bad")
    assert not seen
    with start.cluster_when_needed(lambda: seen.append("ready")):
        for _ in range(2):
            with start.start_all(lambda: seen.append("handle") or Handle()):
                pass
    assert seen == ["start", "ready", "handle", "handle", "end"]
    with start.start_all(Handle):
        assert seen[-1] == "end"  # outside a block the cluster is the caller's
