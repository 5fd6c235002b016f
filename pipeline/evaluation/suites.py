"""What every suite is made of: what it runs on, its figures, and the values behind them.

What could not be judged is no failure: it leaves every denominator and is counted as `unjudged_rate`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import rich
from rich.progress import track
from rich.table import Table

from configs.sampling import SamplingConfig
from pipeline.evaluation.statistics import wilson_interval
from rewards.types import Status, Task, Verdict
from rollout.types import Group, TokenLogprobs

SEQUENCES_PER_BATCH = 256
"""Sequences asked for at once: what an engine has to finish within its timeout."""

Mode = Literal["greedy", "sampled"]
Items = dict[str, float]
"""Of one figure the value of each item, by the item's id."""
T = TypeVar("T")


class Rollout(Protocol):
    """What speaks and scores: the part of `rollout.pool.RolloutPool` that an evaluation needs."""

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Groups as they finish; `index` is the prompt's place."""
        ...

    def continuation_logprobs(self, sequences: list[list[int]], starts: list[int]) -> list[TokenLogprobs]:
        """The log-probabilities of each sequence from its place in `starts` on."""
        ...


class Judge(Protocol):
    """What judges: the part of `rewards.pool.RewardPool` that an evaluation needs."""

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        """Hand over one group."""
        ...

    def gather(self) -> Mapping[int, Sequence[Mapping[str, Verdict]]]:
        """Per group and completion its verdicts by reward."""
        ...


@dataclass(frozen=True, slots=True)
class Session:
    """What a suite is run with. `sampling` is that of sampled completions; a greedy one takes its max_tokens. `rewards`
    is None for a suite that nobody judges."""

    rollout: Rollout
    rewards: Judge | None
    sampling: SamplingConfig
    seed: int

    @property
    def greedy(self) -> SamplingConfig:
        """How the greedy completion is drawn."""
        return SamplingConfig(temperature=0.0, max_tokens=self.sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class Record:
    """One judged completion; `index` is its prompt's place in the suite, `row` the task's in its source.

    `parts` are the scores by reward, by instruction or by choice, where there are several.
    """

    index: int
    row: str
    prompt: str
    truth: Any
    completion: str
    mode: Mode
    score: float | None
    status: Status
    outcome: str
    detail: str
    num_tokens: int
    truncated: bool
    parts: dict[str, float | None] = field(default_factory=dict[str, float | None])


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The figures of a suite by name, and what is behind them.

    items: by figure and item the values whose mean the figure is. An item's id is its row in the source, the same for
    every checkpoint, so that two evaluations can be paired; what was not judged is no item. Rates of the run itself
    (`unjudged_rate`, `truncated_rate`, `mean_length`) have none. records: what was said, in the order of the source.
    """

    figures: dict[str, float]
    items: dict[str, Items] = field(default_factory=dict[str, Items])
    records: list[Record] = field(default_factory=list[Record])


def result(
    items: Mapping[str, Items], shares: Iterable[str], rest: Mapping[str, float], records: Sequence[Record]
) -> SuiteResult:
    """The means of `items` as figures, then `rest`. A figure without items is absent.

    shares: the figures whose items are 0 or 1: they get `_low` and `_high`, the ends of their 95 % Wilson interval.
    """
    figures: dict[str, float] = {}
    for name, values in items.items():
        if not values:
            continue
        figures[name] = sum(values.values()) / len(values)
        if name in shares:
            figures[f"{name}_low"], figures[f"{name}_high"] = wilson_interval(round(sum(values.values())), len(values))
    present = {name: dict(values) for name, values in items.items() if values}
    return SuiteResult(figures | dict(rest), present, list(records))


def results_table(results: Mapping[str, SuiteResult]) -> Table:
    """The figures of all suites, a line each; ends of intervals stand beside what they are of."""
    table = Table("suite", "figure", "value", "95 % interval", box=None, header_style="bold")
    for suite, of_suite in results.items():
        figures = of_suite.figures
        for name, value in figures.items():
            if name.endswith(("_low", "_high")):
                continue
            interval = (
                f"{figures[f'{name}_low']:.4g} - {figures[f'{name}_high']:.4g}" if f"{name}_low" in figures else ""
            )
            table.add_row(suite, name, f"{value:.4g}", interval)
    return table


def likelihoods(
    rollout: Rollout, sequences: Sequence[list[int]], starts: Sequence[int], description: str
) -> Iterator[TokenLogprobs]:
    """Yield the log-probabilities of each sequence from its place in `starts` on, computed in batches."""
    firsts = range(0, len(sequences), SEQUENCES_PER_BATCH)
    for first in watched(firsts, description, len(firsts)):
        batch = slice(first, first + SEQUENCES_PER_BATCH)
        yield from rollout.continuation_logprobs(list(sequences[batch]), list(starts[batch]))


def watched(stream: Iterable[T], description: str, total: int) -> Iterable[T]:
    """The stream, with a progress bar where a person sees one."""
    console = rich.get_console()
    return track(stream, description, total, console=console, transient=True, disable=not console.is_terminal)
