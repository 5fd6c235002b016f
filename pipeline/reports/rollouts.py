"""The kept samples of a run, chosen by reward, verdict, length and step."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

from pipeline.reports.files import read_json_lines
from pipeline.reports.page import write_page
from pipeline.reports.samples import Card, SampleRecord, outcomes, rollout_answer, rollout_files, verdict_word

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})?\.\.(?P<high>{_NUMBER})?|(?P<value>{_NUMBER})", re.IGNORECASE)
UNJUDGED = "none"
"""Word for the reward of a completion that was left out."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float = -float("inf")
    high: float = float("inf")

    @classmethod
    def parse(cls, text: str, option: str) -> Self:
        """`A..B`, `A..`, `..B` or `A`. Raises ValueError naming the option for anything else."""
        match = _RANGE.fullmatch(text.strip())
        if not match or text.strip() == "..":
            raise ValueError(f"{option} {text}: not a range; give A..B, A.., ..B or a single number A")
        low, high = match["low"] or match["value"], match["high"] or match["value"]
        return cls(float(low) if low else cls().low, float(high) if high else cls().high)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions on a sample, all of which must hold.

    reward: None accepts every one; without bounds (`judged` False) those that were left out. verdict: an outcome or a
    status of any reward, or `REWARD:WORD`. length: of the completion in characters.
    """

    reward: Range | None = None
    judged: bool = True
    verdict: str | None = None
    length: Range | None = None
    steps: Range | None = None

    def accepts(self, record: SampleRecord) -> bool:
        """Return whether a sample meets the conditions, apart from its step."""
        reward = record["reward"]
        if not self.judged and reward is not None:
            return False
        if self.reward is not None and (reward is None or reward not in self.reward):
            return False
        if self.length is not None and len(record["completion"]) not in self.length:
            return False
        words = {
            name
            for label, verdict in record["verdicts"].items()
            for word in (verdict_word(verdict), verdict["status"])
            for name in (word, f"{label}:{word}")
        }
        return self.verdict is None or self.verdict in words


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Samples of a run that a filter accepts, newest step first within a stage: the first `shown` of them as cards.

    seen, accepted: counts of samples. words: by reward the counts of the outcomes of those accepted.
    """

    cards: Sequence[Card]
    shown: int
    seen: int
    accepted: int
    words: Mapping[str, Counter[str]]

    @property
    def summary(self) -> str:
        """Counts in words."""
        return f"{self.accepted} of {self.seen} kept samples" + (
            f", {self.shown} of them shown" if self.shown < self.accepted else ""
        )


def select_rollouts(folders: Mapping[str, Path], accepting: Filter, most: int) -> Rollouts:
    """Choose samples from the stages' folders, given by name, and make cards of `most` of them.

    Raises ValueError where no stage has samples.
    """
    found: list[tuple[str, SampleRecord]] = []
    seen = 0
    for name, folder in folders.items():
        for step, file in reversed(rollout_files(folder).items()):
            if accepting.steps is None or step in accepting.steps:
                records = read_json_lines(file)
                seen += len(records)
                found += [(f"{name} step {step}", record) for record in records if accepting.accepts(record)]
    if not seen and not any(rollout_files(folder) for folder in folders.values()):
        raise ValueError(f"no samples in {', '.join(folders)}: stages of type grpo and distill keep some of every step")
    shown = found[:most]
    return Rollouts(list(_cards(shown)), len(shown), seen, len(found), outcomes([record for _, record in found]))


def _cards(samples: Sequence[tuple[str, SampleRecord]]) -> Iterator[Card]:
    for (place, prompt), group in groupby(samples, key=lambda sample: (sample[0], sample[1]["prompt"])):
        answers = [
            rollout_answer(f"{place} · {record['finish_reason']}, {len(record['completion'])} characters", record)
            for _, record in group
        ]
        yield Card(prompt, answers)


def write_rollouts_html(rollouts: Rollouts, run: str, file: Path) -> None:
    """Write the chosen samples as a page."""
    write_page(file, "rollouts.html", title=f"Samples of {run}", reload=False, rollouts=rollouts)
