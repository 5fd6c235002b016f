"""Trainings that get longer after their last step."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from configs.stages import Recipe
from pipeline.disk.recorded import read_figures
from pipeline.run.dry_run import StageSelection, dry_run, outdated
from pipeline.run.lineage import write_lineage
from pipeline.run.stage import run_stage
from pipeline.weights.fresh import create_model
from tests.pipeline.stage_configs import make_checkpoint, sft
from tests.series import series


def test_what_started_from_a_shorter_training_begins_anew(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base")

    def recipe(steps: int) -> Recipe:
        stages = {"first": sft(model, steps=steps), "beside": sft(model)}
        for parent, child in (("first", "second"), ("second", "third")):
            stages[child] = sft(Path(f"stage:{parent}"))
        return Recipe.model_validate({"name": "run", "stages": stages})

    for name in ("first", "beside"):
        write_lineage(tmp_path / name, name, sft(model), sft(model))
        (tmp_path / name / "figures.json").write_text('{"loss": 1.0}')
    everything, first_only = StageSelection(), StageSelection(only="first")
    assert not outdated(dry_run(recipe(4), tmp_path, everything), recipe(4))
    planned = dry_run(recipe(6), tmp_path, everything)
    assert [stage.action for stage in planned] == ["lengthened", "reused", "runs", "runs"]
    assert outdated(planned, recipe(6)) == ["second", "third"]
    assert not outdated(dry_run(recipe(6), tmp_path, first_only), recipe(6))


@pytest.mark.ranks
@pytest.mark.slow
def test_the_series_is_that_of_a_training_of_the_new_length(tmp_path: Path) -> None:
    model = create_model("tiny", 0, tmp_path / "lm")

    def run(name: str, steps: int) -> list[dict[str, float]]:
        settings = {"optimizer": {"learning_rate": 1e-2}, "trainer": {"threads": 1}, "steps": steps}
        run_stage(sft(model, **settings), tmp_path / name)
        return series(tmp_path / name / "metrics.jsonl")

    run("longer", 2)
    assert run("longer", 4) == run("whole", 4)
    one, other = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("longer", "whole"))
    assert one.keys() == other.keys() and all(bool((one[key] == other[key]).all()) for key in one)
    assert read_figures(tmp_path / "longer") is not None
