import json
from pathlib import Path

import pytest

from configs.load import load_config
from configs.stages import Recipe
from jobs.cli import main
from pipeline.planner.devices import cluster_of
from pipeline.planner.layout import own_plan, sweep
from pipeline.planner.stage import planned_stage


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_config("deepseek_v2_lite", [], Recipe).config


def test_a_layout_that_fits_is_found(recipe: Recipe) -> None:
    cluster = cluster_of("8xH100")
    stage = planned_stage(recipe.stages["grpo_preference"], recipe, mean_share=0.5)
    assert (stage.judge_devices, stage.batch_size, stage.reference) == (3, 32, stage.model)
    best = sweep(stage, cluster)[0]
    assert best.reason == "" and best.placement.rollout is not None
    assert best.placement.train.ranks + stage.judge_devices <= 8 and stage.batch_size % best.placement.train.ranks == 0
    own = own_plan(stage, cluster)
    assert own.reason or best.step <= own.step
    assert all(sum(parts.values()) < cluster.device.memory for parts in best.memory.values())


def test_what_cannot_fit_says_why(recipe: Recipe) -> None:
    stage = planned_stage(recipe.stages["grpo_reasoning"], recipe, mean_share=0.5)
    plans = sweep(stage, cluster_of("2xA100"))
    assert all(plan.reason for plan in plans)
    assert "GiB of 73.6 (" in plans[0].reason
    few = own_plan(stage, cluster_of("2xA100"))
    assert few.reason == "takes 5 devices (4 ranks and 4 of engines share theirs, and 1 for judges) of 2 x A100"


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans" / "plan.json"
    line = ["plan", "deepseek_v2_lite", "--cluster", "8xH100", "--stage", "grpo_reasoning", "--sweep"]
    assert main([*line, "--json", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("15.7B parameters, 2.45B active", "fastest", "KV cache", "generate", "device-hours a step", "tried"):
        assert part in said
    told = json.loads(file.read_text())["grpo_reasoning"]
    assert told["parameters"]["total"] == 15_706_484_224
    assert told["best"]["reason"] == "" and told["best"] == told["tried"][0]
    assert told["best"]["step_seconds"] == pytest.approx(sum(told["best"]["seconds"].values()))


def test_a_measured_peak_stands_beside_its_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sft").mkdir()
    steps = [
        {"step": step, "memory/peak_gib": peak, "memory/longest_tokens": tokens}
        for step, peak, tokens in ((1, 1.5, 900), (2, 1.75, 1000), (3, 1.25, 800))
    ]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert main(["plan", "demo", "--cluster", "1xcpu", "--measured", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "measured 1.75 GiB in step 2, micro-batch of 1000 tokens; predicted 0." in printed
    assert f"'{tmp_path}/rm_helpful' has no measured memory" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "8xH10"], "no figures for 'H10'; did you mean"),
        (["--cluster", "8xH100", "--stage", "gate_reasoning"], "no such stage that trains; did you mean"),
        (["--cluster", "8xH100", "--mean-share", "2"], "--mean-share 2.0: a share above 0"),
        (["--cluster", "8xH100", "stages.sft.model.path=a/b"], "model 'a/b': its architecture is not shipped"),
    ],
)
def test_what_is_wrong_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseek_v2_lite", *arguments]) == 2
    assert message in capsys.readouterr().err
