"""Distillation as a stage, on engines: a student learns from two teachers, and a stopped one goes on to the bit.

The student answers yes or no to everything. Each teacher comes from it, as specialists do, and knows the answer to the
prompts of its ground.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from configs.distill import DistillConfig
from pipeline.cluster.room import cluster
from pipeline.data.chat import ChatFormat
from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.reports.stage_page import write_html
from pipeline.stages.context import Context
from pipeline.stages.distill import launch
from pipeline.weights.fresh import create_model
from pipeline.weights.load import load_model, save_hf
from tests.series import series

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

STEPS = 24
PROMPTS = {"y": [f"is {n} big?" for n in range(10, 22)], "n": [f"{n} small" for n in range(10, 22)]}
"""Prompts of each ground, by the answer that its teacher gives."""


def make_model(folder: Path, start: Path, *grounds: str, answers: tuple[str, ...]) -> None:
    """Train a model to give each of the `answers` with equal probability to the prompts of its grounds."""
    model = load_model(start, "float32")
    tokenizer = byte_tokenizer()
    chat = ChatFormat(tokenizer)
    endings = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in answers]
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for ground in grounds for text in PROMPTS[ground]]
    row = micro_batch([Tree(ids, [Branch(ending) for ending in endings]) for ids in prompts])
    ids, source, target = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
    policy = LogprobModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if len(answers) > 1 else 5e-4)
    for _ in range(30 if len(answers) > 1 else 12):
        loss = -policy(ids, Layout(row.lengths, row.parents), source, target).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_hf(model, tokenizer, folder)


def config_of(home: Path, **changes: Any) -> DistillConfig:
    settings: dict[str, Any] = {
        "type": "distill",
        "model": {"path": str(home / "student")},
        "teachers": {
            "agree": {"model": {"path": str(home / "y")}, "domains": ["y"]},
            "refuse": {"model": {"path": str(home / "n")}, "domains": ["n"]},
        },
        "domain_column": "ground",
        "prompts": {
            "source": {"type": "file", "paths": [str(home / "rows.jsonl")]},
            "max_prompt_length": 16,
            "max_bad_share": 0.05,
        },
        "steps": STEPS,
        "prompts_per_step": 16,
        "group_size": 2,
        "sampling": {"max_tokens": 3},
        "optimizer": {"learning_rate": 5e-4},
        "trainer": {"threads": 1},
        "rollout": {"max_model_len": 32, "threads": 1},
        "checkpoint": {"every_steps": 3},
    }
    return DistillConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models and rows, in a cluster that lives as long as the tests."""
    home = tmp_path_factory.mktemp("distill")
    make_model(home / "student", create_model("tiny", 0, home / "new"), *PROMPTS, answers=tuple(PROMPTS))
    rows: list[dict[str, str]] = []
    for answer, prompts in PROMPTS.items():
        make_model(home / answer, home / "student", answer, answers=(answer,))
        rows += [{"prompt": text, "ground": answer} for text in prompts]
    rows.append({"prompt": "who knows", "ground": "nobody's"})
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with cluster():
        yield home


def answers(folder: Path, step: int) -> list[tuple[str, str]]:
    """The ground and the answer of each sample of a step that was kept."""
    records = [json.loads(line) for line in (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()]
    return [("y" if "big" in record["prompt"] else "n", record["completion"]) for record in records]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    launch(config_of(home), home / "whole", Context(home / "evaluations"))
    return home / "whole"


def _stop_at(step: int) -> Any:
    from pipeline.stages.distill import unjudged_samples

    calls: list[int] = []

    def stopping(batch: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return unjudged_samples(batch)

    return stopping


def test_the_student_learns_what_each_teacher_knows(whole: Path) -> None:
    rows = series(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for teacher in ("agree", "refuse"):
        divergence = [row[f"teacher/{teacher}/reverse_kl_mean"] for row in rows]
        assert fmean(divergence[-4:]) < 0.5 * divergence[0], teacher
    kept = [pair for step in range(STEPS - 3, STEPS + 1) for pair in answers(whole, step)]
    for ground in PROMPTS:  # at first it is right half of the time
        right = [answer == ground for prompt, answer in kept if prompt == ground]
        assert fmean(right) > 0.6, ground
    assert max(row["sync/gap_max"] for row in rows) < 1e-3
    assert "has no teacher" in (whole / "bad_rows.jsonl").read_text()
    write_html(whole)
    assert "Divergence from the teachers" in (whole / "report.html").read_text()


@pytest.mark.slow
def test_a_stopped_stage_goes_on_to_the_bit(home: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.distill.unjudged_samples", _stop_at(8))
        with pytest.raises(KeyboardInterrupt):
            launch(config_of(home), folder, Context(home / "evaluations"))
    launch(config_of(home), folder, Context(home / "evaluations"))
    assert series(folder / "metrics.jsonl") == series(whole / "metrics.jsonl")


@pytest.mark.slow
def test_the_sampled_form_learns_too(home: Path) -> None:
    folder = home / "sampled"
    launch(config_of(home, objective={"form": "sampled"}, group_size=8), folder, Context(home / "evaluations"))
    rows = series(folder / "metrics.jsonl")
    assert rows[-1]["loss/reverse_kl_mean"] < 0.3 * rows[0]["loss/reverse_kl_mean"]
