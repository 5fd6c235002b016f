"""The parts common to all suites: the handles they run on, their records, and their figures with intervals.

A completion that could not be judged is no failure: it leaves every denominator and counts as `unjudged_rate`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import rich
from rich.progress import track
from rich.table import Column, Table

from configs.sampling import SamplingConfig
from pipeline.evaluation.statistics import wilson_interval
from rewards.types import Status
from rollout.types import TokenLogprobs

if TYPE_CHECKING:  # readers of results need no Ray
    from rewards.pool.workers import RewardPool
    from rollout.pool import RolloutPool

SEQUENCES_PER_BATCH = 256
"""Sequences in one request for likelihoods, which an engine must finish within its timeout."""

ITEMS, RESAMPLED = "items.json", "resampled.json"
"""Files of an evaluation: values behind the figures that are means over items, and of those that are not."""

DecodingMode = Literal["greedy", "sampled"]
Items = dict[str, float]
"""Values of one figure by the item's id."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Session:
    """The engines and judges that a suite runs on. `rewards` is None for a suite without judged completions."""

    rollout: "RolloutPool"
    rewards: "RewardPool | None"
    sampling: SamplingConfig
    """For sampled completions; greedy ones take its max_tokens alone."""
    seed: int

    @property
    def greedy(self) -> SamplingConfig:
        """The settings of greedy decoding."""
        return SamplingConfig(temperature=0.0, max_tokens=self.sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class CompletionRecord:
    """One completion and its verdict."""

    index: int
    """Index of its prompt in the suite."""
    row: str
    """The row of its task in the source."""
    prompt: str
    truth: Any
    completion: str
    mode: DecodingMode = "greedy"
    score: float | None = None
    status: Status = Status.OK
    outcome: str = ""
    detail: str = ""
    num_tokens: int = 0
    truncated: bool = False
    parts: dict[str, float | None] = field(default_factory=dict[str, float | None])
    """Scores by reward, instruction or choice, where there are several."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The figures of a suite, and the values and records behind them."""

    figures: dict[str, float]
    items: dict[str, Items] = field(default_factory=dict[str, Items])
    """Values, by figure and item, whose mean is the figure.

    An item's id is its row in the source, the same for every checkpoint, so two evaluations can be paired. Unjudged
    completions are no items. Rates of the run (`unjudged_rate`, `truncated_rate`, `mean_length`) have none.
    """
    records: list[CompletionRecord] = field(default_factory=list[CompletionRecord])
    """Completions in the order of the source."""
    resampled: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Values in the bootstrap's resamples, of figures that are no mean over items (`length_controlled_win_rate`)."""


def suite_result(
    items: Mapping[str, Items], shares: Iterable[str], rest: Mapping[str, float], records: Sequence[CompletionRecord]
) -> SuiteResult:
    """Take the means of `items` as figures and add `rest`. A figure without items is absent.

    shares: figures whose items are 0 or 1. They get `_low` and `_high`, the ends of a 95 % Wilson interval.
    """
    present = {name: dict(values) for name, values in items.items() if values}
    figures: dict[str, float] = {}
    for name, values in present.items():
        total = sum(values.values())
        figures[name] = total / len(values)
        if name in shares:
            figures[f"{name}_low"], figures[f"{name}_high"] = wilson_interval(round(total), len(values))
    return SuiteResult(figures | dict(rest), present, list(records))


def results_table(results: Mapping[str, SuiteResult]) -> Table:
    """Tabulate the figures of all suites, each with its interval."""
    names = (Column(header, overflow="fold") for header in ("suite", "figure"))
    table = Table(*names, "value", "95 % interval", box=None, header_style="bold")
    for suite, result in results.items():
        for name, value in result.figures.items():
            if not name.endswith(("_low", "_high")):
                ends = [result.figures.get(f"{name}_{end}") for end in ("low", "high")]
                interval = " - ".join(f"{end:.4g}" for end in ends if end is not None)
                table.add_row(suite, name, f"{value:.4g}", interval)
    return table


def batched_likelihoods(
    rollout: "RolloutPool", sequences: Sequence[list[int]], starts: Sequence[int], description: str
) -> Iterator[TokenLogprobs]:
    """Yield each sequence's log-probabilities from its index in `starts` on, computed in batches."""
    firsts = range(0, len(sequences), SEQUENCES_PER_BATCH)
    for first in with_progress(firsts, description, len(firsts)):
        batch = slice(first, first + SEQUENCES_PER_BATCH)
        yield from rollout.continuation_logprobs(list(sequences[batch]), list(starts[batch]))


def with_progress(stream: Iterable[_T], description: str, total: int) -> Iterable[_T]:
    """Iterate over `stream`, with a progress bar on a terminal."""
    console = rich.get_console()
    return track(stream, description, total, console=console, transient=True, disable=not console.is_terminal)
