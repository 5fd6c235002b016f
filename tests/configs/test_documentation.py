from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.base import Settings, item_of, models_in
from configs.documentation import keys, leaf_count, reference
from configs.sft import SFTConfig
from configs.stages import STAGES, Recipe
from configs.train import OptimizerConfig

DOCS = Path(__file__).parents[2] / "docs" / "configs.md"


def models_below(model: type[Settings]) -> Iterator[type[Settings]]:
    yield model
    for field in model.model_fields.values():
        for part in models_in(field.annotation) + models_in(item_of(field.annotation)):
            yield from models_below(part)


def test_the_committed_page_is_the_one_the_models_make() -> None:
    assert DOCS.read_text() == reference(), "docs/configs.md is out of date: run make docs"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stays_small_enough_to_read(stage: str) -> None:
    assert (
        leaf_count(STAGES[stage]) < 112
    )  # GRPO has nine for published objectives, set by `preset`, four of `lora`, two for lost processes, lag, report_to


def test_every_key_and_every_block_says_what_it_is() -> None:
    silent = [key.name for model in STAGES.values() for key in keys(model) if not key.doc]
    assert not silent
    assert all(model.__doc__ for model in models_below(Recipe))


def test_the_largest_type_of_a_block_counts() -> None:
    # Five plain keys, and of the schedules step_decay's type, warmup_steps, factor and milestones.
    assert leaf_count(OptimizerConfig) == 5 + 4


def test_rows_of_the_optimizer() -> None:
    rows = {key.name: key for key in keys(SFTConfig)}
    learning_rate = rows["optimizer.learning_rate"]
    assert (learning_rate.type, learning_rate.default) == ("number, > 0", "required")
    assert rows["optimizer.schedule"].default == "`type: constant`" and rows["optimizer.schedule"].block
    assert rows["optimizer.schedule.milestones"].default == "`[0.6, 0.9]`"
    assert rows["steps"].type == "integer or null, >= 1"
    assert [name for name in rows if name.startswith("optimizer.schedule.type")] == [
        "optimizer.schedule.type: constant",
        "optimizer.schedule.type: cosine",
        "optimizer.schedule.type: step_decay",
    ]
