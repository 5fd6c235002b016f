"""A reward model as a stage: what it learns, what it leaves, and that a stopped one goes on to the bit."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.reward_model import RewardModelConfig
from pipeline.cluster.room import cluster
from pipeline.data.comparisons import Comparisons
from pipeline.disk.recorded import EVALUATION
from pipeline.judging.scorer import Scorer
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.stages.comparisons import refuse_unlearnable
from pipeline.stages.context import Context
from pipeline.stages.reward_model import launch
from pipeline.train.checkpoints import set_aside_damaged
from tests.pipeline.small_models import small_causal_lm
from tests.series import series

STEPS = 24
WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


def write_pairs(file: Path, number: int, seed: int) -> Path:
    """Answers of a few words; the better one has `please` among them."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(number):
        better, worse = ([rng.choice(WORDS) for _ in range(rng.randint(1, 4))] for _ in range(2))
        better.insert(rng.randint(0, len(better)), "please")
        worse.insert(rng.randint(0, len(worse)), rng.choice(WORDS))
        rows.append({"prompt": rng.choice(WORDS), "chosen": " ".join(better), "rejected": " ".join(worse)})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs_of(file: Path) -> dict[str, Any]:
    return {"source": {"type": "file", "paths": [str(file)]}, "form": "pair", "max_length": 128}


def config_of(home: Path, **changes: Any) -> RewardModelConfig:
    settings: dict[str, Any] = {
        "type": "rm",
        "model": {"path": str(home / "lm")},
        "data": pairs_of(home / "train.jsonl"),
        "eval_data": {"held_out": pairs_of(home / "held_out.jsonl")},
        "eval_every_steps": 10,
        "loss": {"type": "pairwise", "center": 0.01},
        "comparisons_per_step": 16,
        "steps": STEPS,
        "optimizer": {"learning_rate": 2e-3},
        "checkpoint": {"every_steps": 7},
    }
    return RewardModelConfig.model_validate(settings | changes)


def metrics(folder: Path) -> list[dict[str, float]]:
    return series(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, a language model, and in `rm` the stage, run in a cluster that lives as long as the tests."""
    home = tmp_path_factory.mktemp("rm")
    small_causal_lm("llama", home / "lm")
    write_pairs(home / "train.jsonl", 400, seed=0)
    write_pairs(home / "held_out.jsonl", 60, seed=1)
    with cluster():
        launch(config_of(home), home / "rm", Context(Path("evaluations")))
        yield home


@pytest.mark.ranks
def test_it_learns_what_is_preferred(home: Path) -> None:
    rows = metrics(home / "rm")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    evaluated = [int(row["step"]) for row in rows if "eval/held_out/accuracy" in row]
    assert evaluated == [10, 20, STEPS]
    first, last = rows[0], rows[-1]
    assert abs(first["loss/total"] - 0.693) < 0.05  # a new head knows nothing: log 2
    assert last["eval/held_out/accuracy"] >= 0.95 and last["eval/held_out/accuracy_low"] > 0.85
    assert last["reward_model/margin_mean"] > first["reward_model/margin_mean"]
    assert last["eval/held_out/flip_gap_max"] < 1e-4


@pytest.mark.ranks
def test_the_checkpoint_scores_as_training_did(home: Path) -> None:
    """The last evaluation ran on the training ranks; the Scorer reads what they saved."""
    config = config_of(home)
    held_out = Comparisons.load(config.eval_data["held_out"], byte_tokenizer())
    scorer = Scorer(home / "rm" / "hf", "float32", batch_tokens=512)
    records = [json.loads(line) for line in (home / "rm" / EVALUATION / "held_out.jsonl").read_text().splitlines()]
    assert len(records) == len(held_out) == 60
    for index, record in enumerate(records):
        comparison = held_out[index].comparison
        scores = scorer.scores([(comparison.messages, answer) for answer in comparison.answers])
        assert scores == pytest.approx(record["scores"], abs=1e-4)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-4] ^= 1  # the lowest bit of the last float32
    file.write_bytes(content)


@pytest.mark.ranks
def test_stopped_and_run_again_the_series_is_the_same_to_the_bit(home: Path, tmp_path: Path) -> None:
    """A folder as a kill in step 24 leaves it, no model, no evaluation; and one bit of the newest training state, in
    the fraction of a weight, is another one: the state of step 21 is taken."""
    folder = tmp_path / "rm"
    shutil.copytree(home / "rm", folder)
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / EVALUATION)
    flip_bit(folder / "checkpoints" / f"step-{STEPS}" / "rank-0.safetensors")
    notes: list[str] = []
    set_aside_damaged(folder, notes.append)
    assert len(notes) == 1 and "rank-0.safetensors is not what was written" in notes[0] and "step 21" in notes[0]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: STEPS - 1]))
    figures = launch(config_of(home), folder, Context(Path("evaluations")))
    assert metrics(folder) == metrics(home / "rm")
    assert figures["eval/held_out/accuracy"] == metrics(home / "rm")[-1]["eval/held_out/accuracy"]
    for name in ("model.safetensors", "config.json"):
        assert (folder / "hf" / name).read_bytes() == (home / "rm" / "hf" / name).read_bytes()


@pytest.mark.ranks
def test_a_reward_model_goes_on_from_a_reward_model_by_regression(home: Path, tmp_path: Path) -> None:
    """Its head is kept: on answers scored as it scores them there is nothing to learn. Two ranks put the scores of
    three prompts back in order."""
    scorer = Scorer(home / "rm" / "hf", "float32", batch_tokens=512)
    asked = [(prompt, " ".join(WORDS[i:]) + end) for i, prompt in enumerate(WORDS[:3]) for end in (" please", "", " a")]
    scores = scorer.scores([([{"role": "user", "content": prompt}], answer) for prompt, answer in asked])
    rows = [
        {"prompt": prompt, "answer": answer, "score": score}
        for (prompt, answer), score in zip(asked, scores, strict=True)
    ]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = pairs_of(file) | {"form": "scored"}
    config = config_of(
        home,
        model={"path": str(home / "rm" / "hf")},
        data=data,
        eval_data={"same": data},
        loss={"type": "pointwise"},
        comparisons_per_step=2,
        steps=1,
        eval_every_steps=0,
        trainer={"num_ranks": 2, "micro_batch_tokens": 64},
        optimizer={"learning_rate": 1e-9},
    )
    figures = launch(config, tmp_path / "rm", Context(Path("evaluations")))
    assert figures["loss/total"] < 1e-6 and figures["reward_model/squared_error_mean"] < 1e-6
    assert figures["eval/same/squared_error_mean"] < 1e-6 and figures["eval/same/target_correlation"] > 0.999
    assert figures["eval/same/score_std"] > 1


# -- what is refused --------------------------------------------------------------------------------------------------


def rows_of(tmp_path: Path, form: str, *rows: dict[str, Any]) -> Comparisons:
    file = tmp_path / f"{form}.jsonl"
    file.write_text("".join(json.dumps({"prompt": "x"} | row) + "\n" for row in rows))
    config = config_of(tmp_path, data=pairs_of(file) | {"form": form})
    return Comparisons.load(config.data, byte_tokenizer())


@pytest.mark.parametrize(
    ("form", "row", "loss", "complaint"),
    [
        ("scored", {"answer": "a", "score": 1}, {"type": "pairwise"}, "two answers or more"),
        ("pair", {"chosen": "a", "rejected": "b"}, {"type": "pointwise"}, "a score for"),
        ("scored", {"answer": "a", "score": 3}, {"type": "pointwise", "kind": "bce"}, "between 0 and 1"),
        ("pair", {"chosen": "a", "rejected": "b"}, {"type": "pairwise", "margin": 1.0}, r"margin=1\.0"),
    ],
)
def test_data_that_the_loss_can_learn_nothing_from(
    tmp_path: Path, form: str, row: dict[str, Any], loss: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        refuse_unlearnable(config_of(tmp_path, loss=loss).loss, rows_of(tmp_path, form, row))


def test_equal_scores_are_nothing_to_compare(tmp_path: Path) -> None:
    data = rows_of(tmp_path, "scored", {"answer": "a", "score": 1}, {"answer": "b", "score": 1})
    with pytest.raises(ValueError, match=r"1 rows .*scored\.jsonl:1"):
        refuse_unlearnable(config_of(tmp_path).loss, data)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"eval_data": {"a/b": pairs_of(Path("x.jsonl"))}}, "'a/b' names files"),
        ({"eval_data": {}}, "eval_every_steps has no effect"),
        ({"epochs": 1}, "exactly one of"),
        ({"trainer": {"num_ranks": 3}}, "must be a multiple"),
    ],
)
def test_settings_without_effect(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config_of(tmp_path, **changes)
