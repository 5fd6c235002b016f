"""Whoever starts engines tells them where the chat template ends a turn, whatever the tokenizer calls its end."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.stages import STAGES
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.preferences import sampling
from pipeline.stages import evaluate, grpo, preferences, sample
from pipeline.stages.context import Context

SUMS = {"source": {"type": "sums", "size": 8}, "max_prompt_length": 64}
ENGINES = {"sampling": {"max_tokens": 8}, "rollout": {"max_model_len": 96}}
REWARDED = {"prompts": SUMS, "reward": {"name": "math"}}
SUITES = {"suites": {"sums": {"type": "task", **REWARDED}}, **ENGINES}


class Closed:
    """What else is started, and closed again."""

    def close(self) -> None: ...


class Started(Exception):
    """Carries what the engines were started with."""


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A base model's folder, as far as it is read before engines start: its tokenizer ends texts with <eos>."""
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"vocab_size": 264}))
    (tmp_path / "spare.jinja").write_text(
        "{% for m in messages %}{{ '<|spare_0|>' + m.role + '\n' + m.content + '<|spare_1|>' }}{% endfor %}"
        "{{ '<|spare_0|>assistant\n' if add_generation_prompt }}"
    )
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    ("stage", "module", "settings"),
    [
        ("eval", evaluate, SUITES),
        ("sample", sample, {"domains": {"sums": REWARDED}, "samples": 2, **ENGINES}),
        ("preferences", preferences, {"sampled": {"sums": {**REWARDED, "domain": "sums"}}, "samples": 2, **ENGINES}),
        (
            "grpo",
            grpo,
            {
                "prompts": SUMS,
                "rewards": [{"name": "math"}],
                "steps": 1,
                "prompts_per_step": 4,
                "group_size": 2,
                "optimizer": {"learning_rate": 1e-3},
                **ENGINES,
            },
        ),
    ],
)
def test_engines_stop_at_the_end_of_a_turn(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, module: Any, settings: dict[str, Any]
) -> None:
    def start_rollout(*_: Any, stop_token_ids: list[int], **__: Any) -> None:
        raise Started(stop_token_ids)

    model = {"path": base, "chat_template": str(tmp_path / "spare.jinja")}
    config = STAGES[stage].model_validate({"type": stage, "model": model, **settings})
    starting = sampling if stage in ("preferences", "sample") else module
    monkeypatch.setattr(starting, "start_rollout", start_rollout)
    if stage == "grpo":
        for other in ("start_ranks", "start_rewards"):
            monkeypatch.setattr(grpo, other, lambda *_: Closed())
    (tmp_path / "out").mkdir()
    with pytest.raises(Started) as started:
        module.launch(config, tmp_path / "out", Context(tmp_path))
    assert started.value.args == ([7],)


def test_a_gate_evaluates_to_the_end_of_a_turn(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_rollout(*_: Any, stop_token_ids: list[int], **__: Any) -> None:
        raise Started(stop_token_ids)

    monkeypatch.setattr(evaluate, "start_rollout", start_rollout)
    model = {"path": base, "chat_template": str(tmp_path / "spare.jinja")}
    rules = [{"type": "improve", "figure": "sums/accuracy"}]
    config = STAGES["gate"].model_validate(
        {"type": "gate", "candidate": model, "parent": model, "rules": rules, **SUITES}
    )
    with pytest.raises(Started) as started:
        evaluate.run(config, config.candidate, Path(base), tmp_path)
    assert started.value.args == ([7],)
