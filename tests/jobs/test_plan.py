import json
from pathlib import Path

import pytest

from configs.load import load_config
from configs.stages import Recipe
from jobs.cli import main
from pipeline.planner.asked import asked_of
from pipeline.planner.devices import cluster_of
from pipeline.planner.layout import own_plan, sweep


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_config("deepseek_v2_lite", [], Recipe).config


def test_a_layout_that_fits_is_found(recipe: Recipe) -> None:
    cluster = cluster_of("8xH100")
    asked = asked_of(recipe.stages["grpo_preference"], recipe, mean_share=0.5)
    assert (asked.judges, asked.divided, asked.reference) == (3, 32, True)
    best = sweep(asked, cluster)[0]
    assert best.reason == "" and best.rollout is not None
    assert best.train.ranks + asked.judges <= 8 and asked.divided % best.train.ranks == 0
    own = own_plan(asked, cluster)
    assert own.reason or best.step <= own.step
    assert all(sum(parts.values()) < cluster.device.memory for parts in best.memory.values())


def test_what_cannot_fit_says_why(recipe: Recipe) -> None:
    asked = asked_of(recipe.stages["grpo_reasoning"], recipe, mean_share=0.5)
    plans = sweep(asked, cluster_of("2xA100"))
    assert all(plan.reason for plan in plans)
    assert "GiB of 73.6 (" in plans[0].reason
    few = own_plan(asked, cluster_of("2xA100"))
    assert few.reason == "takes 5 devices (4 ranks and 4 of engines share theirs, and 1 for judges) of 2 x A100"


def test_the_verb_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans" / "plan.json"
    line = ["plan", "deepseek_v2_lite", "--cluster", "8xH100", "--stage", "grpo_reasoning", "--sweep"]
    assert main([*line, "--json", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("15.7B parameters, 2.45B active", "quickest", "KV cache", "generate", "device-hours a step", "tried"):
        assert part in said
    told = json.loads(file.read_text())["grpo_reasoning"]
    assert told["parameters"]["total"] == 15_706_484_224
    assert told["best"]["reason"] == "" and told["best"] == told["tried"][0]
    assert told["best"]["step_seconds"] == pytest.approx(sum(told["best"]["seconds"].values()))


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
