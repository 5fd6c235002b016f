"""The recipe of the ablations: a form that differed in more than its setting would answer another question."""

from typing import Any

import pytest

from configs.load import load_config
from configs.stages import Recipe
from jobs.bench.ablations import QUESTIONS

RECIPE = load_config("jobs/bench/ablations.yaml", [], Recipe).config
SETTINGS = {
    "std": {"objective.normalize_std"},
    "token_ratio": {"updates_per_batch"},
    "sequence_ratio": {"objective.ratio", "objective.clip_low", "objective.clip_high"},  # GSPO's bounds go with it
    "completion_ratio": {"objective.ratio"},
    "unbiased_1e-1": {"objective.kl", "objective.kl_coef"},
    "eight_updates_mask": {"objective.off_policy_mask"},
    "reward_model_gated": {"rewards"},
}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


@pytest.mark.parametrize("form", SETTINGS)
def test_a_form_differs_from_the_first_of_its_question_in_its_setting(form: str) -> None:
    first = next(forms[0] for forms in QUESTIONS.values() if form in forms[1:]) if form != "token_ratio" else "plain"
    one, other = (flat(RECIPE.stages[name].model_dump()) for name in (first, form))
    assert {key for key in one if one[key] != other[key]} == SETTINGS[form]


def test_every_form_starts_at_the_same_model_and_is_asked_the_same() -> None:
    forms = {form for question in QUESTIONS.values() for form in question}
    assert forms == {name for name, stage in RECIPE.stages.items() if stage.type == "grpo"}
    starts = {str(RECIPE.stages[form].model.path) for form in forms}  # type: ignore[union-attr]
    assert starts == {"stage:sft"}
