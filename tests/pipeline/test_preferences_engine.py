"""Preference data and training conversations from a real engine and real judges: sums by their truth, programs by
running them, from a model that has half learned both."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from configs.data import ComparisonData, SumsSource
from configs.preferences import PreferencesConfig
from configs.sample import SampleConfig
from pipeline.data.chat import ChatFormat
from pipeline.data.comparisons import Comparisons
from pipeline.data.sums import draw_sums
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.preferences import sampling
from pipeline.preferences.split import prompt_key
from pipeline.stages import preferences, sample
from pipeline.stages.context import Context
from tests.rollout import tiny
from tests.rollout.pools import engine_pool

pytestmark = pytest.mark.engine

STEPS, BATCH = 75, 48


def half_learned() -> Any:
    """A Llama that adds and programs digits, not always rightly."""
    chat = ChatFormat(byte_tokenizer())
    source = SumsSource(type="sums", size=STEPS * BATCH, digits=1, shares={"programs": 0.3})
    rows = [chat.training_ids(row["messages"]) for row in draw_sums(source)]
    return tiny.taught(rows, BATCH)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(half_learned(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def engine(checkpoint: Path) -> Iterator[None]:
    """One engine for all stages of this file."""
    with engine_pool(checkpoint) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "close", lambda: None)  # what a stage does with its own
        patch.setattr(sampling, "start_rollout", lambda *_, **__: pool)
        yield


def asked(size: int, programs: float) -> dict[str, Any]:
    source = {"type": "sums", "size": size, "digits": 1, "shares": {"programs": programs}}
    reward = {"name": "code" if programs else "math"}
    return {"prompts": {"source": source, "max_prompt_length": 16}, "reward": reward}


def settings(checkpoint: Path, **own: Any) -> dict[str, Any]:
    return own | {
        "model": {"path": str(checkpoint)},
        "samples": 4,
        "sampling": {"max_tokens": 16},
        "rollout": tiny.CONFIG.model_dump(),
        "held_out": 0.3,
    }


@pytest.fixture(scope="module")
def built(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreferencesConfig, Path, dict[str, float]]:
    sampled = {
        "sums": asked(60, 0.0) | {"domain": "math"},
        "programs": asked(16, 1.0) | {"domain": "code"},
    }
    own = settings(checkpoint, type="preferences", sampled=sampled, filters={"pairs_per_prompt": 2})
    config = PreferencesConfig.model_validate(own)
    preferences.check(config)
    folder = tmp_path_factory.mktemp("preferences")
    return config, folder, preferences.launch(config, folder, Context(Path("evaluations")))


def test_pairs_are_told_apart_by_truth_and_by_running(
    built: tuple[PreferencesConfig, Path, dict[str, float]],
) -> None:
    _, folder, figures = built
    splits = load_from_disk(folder / "data")
    rows = [*splits["train"], *splits["held_out"]]
    assert {row["domain"] for row in rows} == {"math", "code"}
    assert figures["kept"] == len(rows) > 5 and figures["held_out"] == len(splits["held_out"])
    for row in rows:
        asked = row["messages"][-1]["content"]
        first, second = asked.removeprefix("py ").removesuffix("=").split("+")
        better, worse = row["answers"]
        if row["source"] == "programs":
            assert row["scores"][0] == 1.0 and better.startswith("print(")
        else:
            total = str(int(first) + int(second))
            assert (
                row["scores"] == [1.0, 0.0] and better.rpartition(";")[2].strip() == total != worse.rpartition(";")[2]
            )
    for name in ("sums", "programs"):
        assert 0 < figures[f"sampled/{name}/score"] < 1 and figures[f"sampled/{name}/unjudged"] == 0
    sides = [{prompt_key(row["messages"]) for row in splits[name]} for name in ("train", "held_out")]
    assert not sides[0] & sides[1]


def test_a_reward_model_can_read_them(built: tuple[PreferencesConfig, Path, dict[str, float]]) -> None:
    source = {"type": "dataset", "paths": [str(built[1] / "data")]}
    loaded = Comparisons.load(ComparisonData.model_validate({"source": source, "max_length": 64}), byte_tokenizer())
    assert len(loaded) == built[2]["kept"] - built[2]["held_out"] and not loaded.bad_rows.counts


def test_killed_and_run_again_it_is_the_same(
    built: tuple[PreferencesConfig, Path, dict[str, float]], tmp_path: Path
) -> None:
    config, folder, figures = built
    (tmp_path / "answers").mkdir()
    files = sorted((folder / "answers").iterdir())
    for file in files[1:]:  # as if it had been killed before the first of all batches was judged
        (tmp_path / "answers" / file.name).write_bytes(file.read_bytes())
    assert preferences.launch(config, tmp_path, Context(Path("evaluations"))) == figures
    assert [file.read_bytes() for file in sorted((tmp_path / "answers").iterdir())] == [
        file.read_bytes() for file in files
    ]
    again, before = (load_from_disk(where / "data") for where in (tmp_path, folder))
    assert {name: rows.to_list() for name, rows in again.items()} == {
        name: rows.to_list() for name, rows in before.items()
    }


def test_rejection_sampling_keeps_what_is_right_and_ended(checkpoint: Path, tmp_path: Path) -> None:
    domains = {"sums": asked(20, 0.0) | {"max_rows": 8}, "programs": asked(8, 1.0) | {"keep": 2}}
    config = SampleConfig.model_validate(settings(checkpoint, type="sample", domains=domains))
    sample.check(config)
    figures = sample.launch(config, tmp_path, Context(Path("evaluations")))
    splits = load_from_disk(tmp_path / "data")
    rows = [*splits["train"], *splits.get("held_out", [])]
    assert figures["sums/kept"] <= 8 and len(rows) == figures["kept"] > 0
    for row in rows:
        asked_for, answer = (message["content"] for message in row["messages"])
        first, second = asked_for.removeprefix("py ").removesuffix("=").split("+")
        if row["domain"] == "sums":
            assert answer.rpartition(";")[2].strip() == str(int(first) + int(second))
        else:
            assert answer.startswith("print(") and row["score"] == 1.0
