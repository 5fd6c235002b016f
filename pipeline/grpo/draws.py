"""Draws of prompts that engines sample and judges judge: that of the present step, and those of the steps to come.

A step trains the completions of its own draws, all of them, whenever they finish. So the prompts come in the order of a
stage without lag, and short answers have no advantage. A draw begins `rollout.max_lag` steps early at most, so the
weights that sample a token lie at most as many versions behind those that it trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from configs.grpo import GRPOConfig
from pipeline.data.prompts import Prompt, Prompts
from pipeline.grpo.experience import JudgedGroup
from rewards.pool.workers import RewardPool
from rollout.pool import RolloutPool
from rollout.types import StoredGroup

_POLL_SECONDS = 0.05
"""Longest that finished judgements wait for a report of an engine."""


@dataclass
class _Draw:
    """Prompts that were sent to the engines, and the groups that have come."""

    number: int
    prompts: Sequence[Prompt]
    ticket: int
    groups: dict[int, StoredGroup] = field(default_factory=dict[int, StoredGroup])


def steps_begun(step: int, config: GRPOConfig) -> range:
    """Return the steps whose first draw may begin before `step` is trained: its own and those within the lag."""
    return range(step, min(step + config.rollout.max_lag, config.steps) + 1)


def draws_of(step: int, config: GRPOConfig) -> range:
    """Return the numbers of the draws that a step may need, one for each round of dynamic sampling."""
    rounds = config.dynamic_sampling.max_rounds
    return range((step - 1) * rounds + 1, step * rounds + 1)


def draw_seed(seed: int, draw: int) -> int:
    """Return the sampling seed of a draw of prompts, so that a resumed run repeats it."""
    return seed * 1_000_003 + draw


class Draws:
    """The draws that were begun and not taken yet.

    Example:
        draws.begin(prompts, step=1)
        groups = draws.judged(prompts, number=1, step=1)
    """

    def __init__(self, config: GRPOConfig, rollout: RolloutPool, rewards: RewardPool) -> None:
        self._config, self._rollout, self._rewards = config, rollout, rewards
        self._begun: dict[int, _Draw] = {}

    def begin(self, prompts: Prompts, step: int) -> None:
        """Send the first draw of `step`, and of each step that may begin with it, to the engines."""
        for each in steps_begun(step, self._config):
            self._draw(prompts, draws_of(each, self._config)[0], each)

    def judged(self, prompts: Prompts, number: int, step: int) -> list[JudgedGroup]:
        """Wait for the groups of a draw and their verdicts, and take them. Raises RolloutError or
        RewardsUnavailable."""
        draw = self._draw(prompts, number, step)
        for group in self._rollout.groups(draw.ticket):
            self._judge(draw, group)
        del self._begun[number]
        size = self._config.prompts_per_step
        keys = range(number * size, (number + 1) * size)
        verdicts = self._rewards.gather(keys, meanwhile=self._work if self._begun else None)
        return [JudgedGroup(prompt, draw.groups[i], verdicts[keys[i]]) for i, prompt in enumerate(draw.prompts)]

    def judge_finished(self) -> None:
        """Send the judges what the engines have finished."""
        for draw in self._begun.values():
            for group in self._rollout.finished(draw.ticket):
                self._judge(draw, group)

    def _draw(self, prompts: Prompts, number: int, step: int) -> _Draw:
        if number not in self._begun:
            config, drawn = self._config, prompts.take(number, self._config.prompts_per_step)
            request = [prompt.token_ids for prompt in drawn], config.sampling, config.group_size
            ticket = self._rollout.submit(*request, draw_seed(config.seed, number), step)
            self._begun[number] = _Draw(number, drawn, ticket)
        return self._begun[number]

    def _judge(self, draw: _Draw, group: StoredGroup) -> None:
        draw.groups[group.index] = group
        key, task = draw.number * self._config.prompts_per_step + group.index, draw.prompts[group.index].task
        self._rewards.submit(key, task, [completion.text for completion in group.completions])

    def _work(self) -> None:
        self._rollout.work(_POLL_SECONDS)
