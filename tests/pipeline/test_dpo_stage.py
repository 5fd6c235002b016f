"""DPO as a stage: what it learns, what it keeps of the reference, and that a stopped one goes on to the bit."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.dpo import DPOConfig
from configs.load import load_config
from configs.stages import Recipe
from pipeline.cluster.room import cluster
from pipeline.data.comparisons import Comparisons
from pipeline.data.trees import Tree
from pipeline.disk.recorded import EVALUATION, REFERENCE
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.planner.stage import planned_stage
from pipeline.stages.context import Context
from pipeline.stages.dpo import launch
from pipeline.train.reference import reference_logprobs
from tests.pipeline.small_models import small_causal_lm
from tests.pipeline.test_reward_model_stage import pairs_of, write_pairs
from tests.series import series

STEPS = 16


def config_of(home: Path, **changes: Any) -> DPOConfig:
    settings: dict[str, Any] = {
        "type": "dpo",
        "model": {"path": str(home / "lm")},
        "data": pairs_of(home / "train.jsonl"),
        "eval_data": {"held_out": pairs_of(home / "held_out.jsonl")},
        "eval_every_steps": 10,
        "comparisons_per_step": 16,
        "steps": STEPS,
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every_steps": 7},
        "trainer": {"micro_batch_tokens": 512, "threads": 1},
    }
    return DPOConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, a language model, and in `dpo` the stage, run in a cluster that lives as long as the tests."""
    home = tmp_path_factory.mktemp("dpo")
    small_causal_lm("llama", home / "lm")
    write_pairs(home / "train.jsonl", 300, seed=0)
    write_pairs(home / "held_out.jsonl", 60, seed=1)
    with cluster():
        launch(config_of(home), home / "dpo", Context(Path("evaluations")))
        yield home


@pytest.mark.ranks
def test_it_learns_what_is_preferred(home: Path) -> None:
    rows = series(home / "dpo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [int(row["step"]) for row in rows if "eval/held_out/accuracy" in row] == [10, STEPS]
    first, last = rows[0], rows[-1]
    assert abs(first["loss/total"] - math.log(2)) < 1e-4  # the policy is the reference
    assert abs(first["dpo/margin_mean"]) < 1e-4
    assert last["eval/held_out/accuracy"] > 0.9 and last["eval/held_out/accuracy_low"] > 0.8
    assert last["dpo/margin_mean"] > 0.1 and last["loss/total"] < 0.6
    gap = last["eval/held_out/chosen_mean"] - last["eval/held_out/rejected_mean"]
    assert gap == pytest.approx(last["eval/held_out/margin_mean"])


@pytest.mark.ranks
def test_stopped_and_run_again_the_series_is_the_same_to_the_bit(home: Path, tmp_path: Path) -> None:
    """A folder as a kill in step 16 leaves it, after whose checkpoint of step 14 the policy is no longer the reference.
    One part of the reference is gone and is computed again: by the first weights, not by those of the checkpoint."""
    folder = tmp_path / "dpo"
    shutil.copytree(home / "dpo", folder)
    for part in ("hf", EVALUATION, f"checkpoints/step-{STEPS}"):
        shutil.rmtree(folder / part)
    [first, *_] = sorted((folder / REFERENCE / "data").glob("*/*.npy"))
    before = first.read_bytes()
    first.write_bytes(before[:-4])
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: STEPS - 1]))
    launch(config_of(home), folder, Context(Path("evaluations")))
    assert first.read_bytes() == before
    assert series(folder / "metrics.jsonl") == series(home / "dpo" / "metrics.jsonl")
    weights = Path("hf", "model.safetensors")
    assert (folder / weights).read_bytes() == (home / "dpo" / weights).read_bytes()


class CountingRanks:
    """Ranks whose log-probability of a token is minus its id."""

    def __init__(self) -> None:
        self.scored = 0

    def answer_logprobs(self, trees: list[Tree]) -> list[list[np.ndarray]]:
        self.scored += len(trees)
        return [[-np.array(branch.token_ids, np.float32) for branch in tree.branches] for tree in trees]


def test_the_reference_is_computed_once_for_its_weights_and_tokens(tmp_path: Path) -> None:
    data = Comparisons.load(pairs(tmp_path, 300), byte_tokenizer())

    def scored(data: Comparisons, reference: str) -> int:
        ranks: Any = CountingRanks()
        logprobs = reference_logprobs(tmp_path / "reference", data, ranks, reference)
        for index, answers in enumerate(logprobs):
            assert [(-values).tolist() for values in answers] == data[index].answer_ids
        return ranks.scored

    assert scored(data, "weights") == 300
    assert scored(data, "weights") == 0
    [_, second] = sorted((tmp_path / "reference").glob("*/*.npy"))
    second.unlink()
    assert scored(data, "weights") == 44  # 256 are in the first part
    assert scored(data, "other weights") == 300
    assert scored(Comparisons.load(pairs(tmp_path, 299), byte_tokenizer()), "other weights") == 299
    assert len(list((tmp_path / "reference").iterdir())) == 1


def pairs(folder: Path, number: int) -> Any:
    return config_of(folder, data=pairs_of(write_pairs(folder / "pairs.jsonl", number, seed=2))).data


def test_a_recipe_of_dpo_rounds_is_planned(tmp_path: Path) -> None:
    """The documented recipe: each round's preferences are sampled from the policy of the round before."""
    page = (Path(__file__).parents[2] / "docs" / "dpo.md").read_text()
    block = next(part for part in page.split("```yaml\n") if part.startswith("name: iterative")).split("```")[0]
    (tmp_path / "iterative.yaml").write_text(block)
    recipe = load_config(str(tmp_path / "iterative.yaml"), [], Recipe).config
    assert [stage.type for stage in recipe.stages.values()] == ["sft", "preferences", "dpo", "preferences", "dpo"]
    second = recipe.stages["dpo_2"]
    assert isinstance(second, DPOConfig) and second.model.path == "stage:dpo_1"
    planned = planned_stage(second, recipe, mean_share=0.5)
    assert not planned.reference and planned.batch_size == second.comparisons_per_step


def test_a_dpo_policy_is_a_language_model_in_a_recipe() -> None:
    with pytest.raises(ValueError, match="fits here"):
        Recipe.model_validate({"name": "wrong", "stages": {"rm": RM, "dpo": DPO | {"model": {"path": "stage:rm"}}}})


OPTIMIZER = {"learning_rate": 1e-3}
PAIRS = {"source": {"type": "file", "paths": ["x.jsonl"]}, "form": "pair"}
DPO = {"type": "dpo", "data": PAIRS, "comparisons_per_step": 2, "steps": 1, "optimizer": OPTIMIZER}
RM = DPO | {"type": "rm", "model": {"path": "x"}, "loss": {"type": "pairwise"}}
