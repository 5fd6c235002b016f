"""Refused settings of `preferences`, `sample` and comparisons: those without effect and those that can't work."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.data import ComparisonData
from configs.preferences import PreferencesConfig
from configs.references import resolve_references
from configs.sample import SampleConfig

SUMS: dict[str, Any] = {"source": {"type": "sums", "size": 8}, "max_prompt_length": 16}
SPEAKS: dict[str, Any] = {
    "model": {"path": "x"},
    "sampling": {"max_tokens": 8},
    "rollout": {"max_model_len": 24},
}
SAMPLED = {"math": {"prompts": SUMS, "reward": {"name": "math"}, "domain": "reason"}}
READ = {"hh": {"data": {"source": {"type": "file", "paths": ["hh.jsonl"]}, "form": "dialogue"}, "domain": "safety"}}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({}, "nothing to make"),
        ({"sampled": SAMPLED}, "'sampled' needs 'model'"),
        ({"sampled": SAMPLED} | SPEAKS | {"rollout": None}, "'sampled' needs 'rollout'"),
        ({"read": READ, "model": {"path": "x"}}, "'model' has no effect"),
        ({"read": {"math": READ["hh"]}, "sampled": SAMPLED} | SPEAKS, "a name in both"),
        ({"sampled": SAMPLED} | SPEAKS | {"sampling": {"max_tokens": 8, "temperature": 0}}, "answer the same"),
        ({"sampled": SAMPLED} | SPEAKS | {"sampling": {"max_tokens": 9}}, r"rollout\.max_model_len=24"),
        ({"sampled": {"a/b": SAMPLED["math"]}} | SPEAKS, "becomes a file's"),
        ({"read": {"a.b": READ["hh"]}}, "becomes a file's"),
        ({"sampled": {"math": SAMPLED["math"] | {"reward": {"name": "math", "weight": 0.5}}}} | SPEAKS, "no effect"),
        (
            {"read": {"hh": {"data": READ["hh"]["data"] | {"max_length": 64}, "domain": "d"}}},
            r"max_length has no effect",
        ),
        ({"read": READ, "shares": {"safety": 0.6, "math": 0.3}}, "add up to 1"),
        ({"read": READ, "shares": {"safety": 1.5, "math": -0.5}}, "above 0"),
        ({"read": READ, "filters": {"max_similarity": 0.4}}, "greater than or equal to 0.5"),
        ({"read": READ, "filters": {"max_length_ratio": 1.0}}, "greater than 1"),
    ],
)
def test_impossible_preferences_are_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PreferencesConfig.model_validate({"type": "preferences"} | own)


@pytest.mark.parametrize(
    ("own", "domain", "message"),
    [
        ({}, {"keep": 9}, "samples=8"),
        ({}, {"reward": None, "min_score": 0.5}, "min_score has no effect"),
        ({}, {"prompts": SUMS | {"reward": "math"}}, r"prompts\.reward"),
        ({}, {"filters": [{"name": "length", "args": {"longest": 9}}]}, "'length' needs a gate"),
        ({}, {"filters": [{"name": "math", "gate": 1.0}]}, "every label may appear once"),
        ({"sampling": {"max_tokens": 8, "temperature": 0}}, {}, "all the same"),
        ({"rollout": {"max_model_len": 20}}, {}, r"rollout\.max_model_len=20"),
    ],
)
def test_impossible_samples_are_refused(own: dict[str, Any], domain: dict[str, Any], message: str) -> None:
    def config(own: dict[str, Any], domain: dict[str, Any]) -> dict[str, Any]:
        domains = {"math": {"prompts": SUMS, "reward": {"name": "math"}} | domain}
        return {"type": "sample", "domains": domains} | SPEAKS | own

    SampleConfig.model_validate(config({}, {}))
    with pytest.raises(ValidationError, match=message):
        SampleConfig.model_validate(config(own, domain))


@pytest.mark.parametrize(
    ("form", "column"), [("comparison", "prompt"), ("pair", "answers"), ("dialogue", "prompt"), ("ranking", "score")]
)
def test_a_column_that_a_form_does_not_have_is_refused(form: str, column: str) -> None:
    with pytest.raises(ValidationError, match=rf"columns\.{column} .*'{form}'"):
        ComparisonData.model_validate({"source": SUMS["source"], "form": form, "columns": {column: "x"}})


def test_references_are_replaced_and_the_rest_stays_valid() -> None:
    own = {"type": "preferences", "sampled": SAMPLED, "read": READ} | SPEAKS | {"model": {"path": "stage:sft"}}
    config = PreferencesConfig.model_validate(own)
    there = resolve_references(config, lambda name: Path("/run") / name / "hf")
    assert there.model is not None and there.model.path == "/run/sft/hf"
    assert there.model_copy(update={"model": config.model}) == config
