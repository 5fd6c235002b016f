"""Completions that are sampled ahead of their step: in which order, how old, and by the weights of which versions."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import numpy as np
import pytest
import torch

from configs.grpo import GRPOConfig
from configs.sampling import SamplingConfig
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.trees import Branch
from pipeline.errors import RunStopped
from pipeline.grpo.draws import Draws, draws_of, steps_begun
from pipeline.grpo.figures import lag_figures
from pipeline.grpo.sync import refuse_mismatch
from pipeline.objectives.policy import mismatch
from rewards.types import Task, Verdict
from rollout.queue import CompletionKey, CompletionRequest, GenerationQueue, Progress
from rollout.types import Begun, Completion, CompletionColumns, StoredCompletion, StoredGroup
from tests.settings import GRPO

ROOM, TRAINING_TICKS = 12, 20


def config_of(max_lag: int, **changes: Any) -> GRPOConfig:
    rollout = GRPO["rollout"] | {"max_lag": max_lag}
    guarded = {"objective": {"importance_cap": 2.0}, "placement": "separate", "rollout": rollout}
    return GRPOConfig.model_validate(GRPO | {"steps": 8, "prompts_per_step": 4, "group_size": 4} | guarded | changes)


def length_of(request: CompletionRequest) -> int:
    """Few completions are long, as in training."""
    return 60 if (request.seed or 0) % 9 == 0 else 5 + (request.seed or 0) % 7


class Engine:
    """An engine that decodes a token of each of ROOM completions a tick, behind the real queue."""

    def __init__(self) -> None:
        self.queue = GenerationQueue[StoredCompletion](num_engines=1)
        self.version = self.ticks = 0
        self.held: dict[CompletionKey, tuple[CompletionRequest, Begun]] = {}

    def submit(self, prompts: list[list[int]], sampling: SamplingConfig, count: int, seed: int, step: int) -> int:
        return self.queue.add(prompts, sampling, count, seed, step)

    def tick(self) -> None:
        self.ticks += 1
        for request in self.queue.take(0, ROOM - len(self.held)):
            begun = request.begun or Begun([], [], ())
            versions = begun.versions if self.version in dict(begun.versions).values() else (
                *begun.versions, (len(begun.token_ids), self.version)
            )  # fmt: skip
            self.held[request.key] = request, Begun(begun.token_ids, begun.logprobs, versions)
        finished = list[tuple[CompletionKey, StoredCompletion, None]]()
        for key, (request, begun) in list(self.held.items()):
            begun = Begun([*begun.token_ids, 1], [*begun.logprobs, -1.0], begun.versions)
            self.held[key] = request, begun
            if len(begun.token_ids) == length_of(request):
                del self.held[key]
                (_, first), *updates = begun.versions
                done = Completion(begun.token_ids, begun.logprobs, "", "stop", first, updates=tuple(updates))
                finished.append((key, done.stored(), None))
        self.queue.receive(0, Progress(finished, {}, ROOM))

    def groups(self, ticket: int) -> Iterator[StoredGroup]:
        while True:
            groups, is_last = self.queue.pop(ticket)
            yield from groups
            if is_last:
                self.queue.drop(ticket)
                return
            self.tick()

    def finished(self, ticket: int) -> list[StoredGroup]:
        return self.queue.pop(ticket)[0]

    def update(self, version: int) -> None:
        self.queue.give_back(0, {key: begun for key, (_, begun) in self.held.items() if begun.token_ids})
        self.held, self.version = {}, version


class Judges:
    def __init__(self) -> None:
        self.groups: dict[int, int] = {}

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        assert index not in self.groups, "judged twice"
        self.groups[index] = len(completions)

    def gather(self, indices: range, meanwhile: Any) -> dict[int, list[dict[str, Verdict]]]:
        return {index: [{"math": Verdict(1.0)}] * self.groups.pop(index) for index in indices}


class Numbered:
    """Prompts that name their draw and their place."""

    def take(self, draw: int, count: int) -> list[Prompt]:
        return [Prompt([1, draw, place], Task(f"{draw}.{place}", "")) for place in range(count)]


def train(max_lag: int) -> tuple[list[list[Any]], list[dict[str, float]], int]:
    """Run all steps; return each step's groups as (prompt, lengths), its lags, and the ticks that it all took."""
    config, engine, judges = config_of(max_lag), Engine(), Judges()
    draws = Draws(config, cast(Any, engine), cast(Any, judges))
    prompts, steps, lags = cast(Prompts, Numbered()), list[list[Any]](), list[dict[str, float]]()
    for step in range(1, config.steps + 1):
        draws.begin(prompts, step)
        groups = draws.judged(prompts, draws_of(step, config)[0], step)
        steps.append([(group.prompt.task.prompt, group.lengths_G) for group in groups])
        completions = list(chain.from_iterable(group.group.completions for group in groups))
        lags.append(lag_figures(completions, version=step - 1))
        for _ in range(TRAINING_TICKS):
            engine.tick()
            draws.judge_finished()
        engine.update(step)
    assert not judges.groups and not engine.held and not engine.queue.take(0, 9), "nothing is sampled for nobody"
    return steps, lags, engine.ticks


def test_the_lag_is_bounded_and_the_answers_are_those_of_a_stage_without_it() -> None:
    """With every lag the same prompts, and of each the same completions, in the same steps: long ones too."""
    without, no_lags, slow = train(0)
    assert [row["rollout/lag_max"] for row in no_lags] == [0.0] * 8
    assert [groups[0][0] for groups in without] == [f"{step}.0" for step in range(1, 9)]
    for max_lag in (1, 2, 3):
        steps, lags, ticks = train(max_lag)
        assert steps == without
        assert [row["rollout/lag_max"] for row in lags] == [min(step, max_lag) for step in range(8)]
        assert any(row["rollout/several_versions_rate"] > 0 for row in lags)
        assert ticks < 0.8 * slow, "it samples while it trains"


def test_the_steps_that_may_begin_are_those_within_the_lag() -> None:
    config = config_of(2, dynamic_sampling={"max_rounds": 3})
    assert list(steps_begun(1, config)) == [1, 2, 3]
    assert list(steps_begun(7, config)) == [7, 8], "there is no ninth"
    assert list(steps_begun(5, config_of(0))) == [5]
    assert list(draws_of(2, config)) == [4, 5, 6]


def test_the_lag_by_hand() -> None:
    """Ten tokens of version 4 and ten of version 5, and four of version 5, trained by version 5."""
    mixed = Completion([1] * 20, [0.0] * 20, "", "stop", 4, updates=((10, 5),)).stored()
    new = Completion([1] * 4, [0.0] * 4, "", "stop", 5).stored()
    assert mixed.version_counts == [(4, 10), (5, 10)] and new.version_counts == [(5, 4)]
    figures = lag_figures([mixed, new], version=5)
    assert figures["rollout/lag_mean"] == pytest.approx(10 / 24) and figures["rollout/lag_max"] == 1
    assert figures["rollout/no_lag_rate"] == pytest.approx(14 / 24)
    assert figures["rollout/several_versions_rate"] == 0.5


def test_only_tokens_without_lag_are_held_to_the_bound_of_the_sync() -> None:
    """2,000 tokens, of which half have a lag and moved by 0.1; in a sequence of the others two experts tied."""
    gap_N = torch.full((2000,), 0.1)
    gap_N[1000:] = 1e-6
    gap_N[1000:1010] = 0.3
    no_lag_N = (torch.arange(2000) >= 1000).float()
    sequence_N = torch.arange(2000) // 10
    sums, maxima = mismatch(gap_N, sequence_N, 200, no_lag_N)
    metrics = {name: float(value) / 2000 for name, value in sums.items()} | {k: float(v) for k, v in maxima.items()}
    refuse_mismatch(metrics, 2000, 1e-5, step=3)
    with pytest.raises(RunStopped, match="differ on the sampled tokens"):
        refuse_mismatch(metrics | {"mismatch/no_lag_abs_mean": 0.01}, 2000, 1e-5, step=3)
    refuse_mismatch(metrics | {"mismatch/no_lag_abs_mean": 0.01, "mismatch/no_lag_rate": 0.1}, 2000, 1e-5, step=3)
    with pytest.raises(RunStopped):
        without = {name: value for name, value in metrics.items() if "no_lag" not in name}
        refuse_mismatch(without, 2000, 1e-5, step=3)


def test_a_rank_knows_which_tokens_have_no_lag() -> None:
    own = CompletionColumns(np.arange(4, dtype=np.int32), np.zeros(4, np.float32), versions=((0, 2), (3, 4)))
    branch = Branch(range(4), {"weights": [1.0], "version": [4.0]}, stored="reference").filled(own)
    assert {name: list(values) for name, values in branch.columns.items()} == {
        "rollout_logprobs": [0] * 4,
        "weights": [1] * 4,
        "no_lag": [0, 0, 0, 1],
    }


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"placement": "colocated"}, r"rollout\.max_lag=1 .*ranks' own devices.*set placement to separate"),
        ({"objective": {}}, r"rollout\.max_lag=1 .*set objective\.importance_cap.* or objective\.off_policy_mask"),
    ],
)
def test_a_lag_without_devices_or_a_guard_is_refused(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        config_of(1, **changes)
    config_of(1, objective={"off_policy_mask": 0.1})
    config_of(0, placement="colocated", objective={})
