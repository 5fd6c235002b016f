"""Answers of a model to prompts: sampled, judged while others are still being written, and kept.

They lie below the stage's folder, a file for every batch of prompts, which appears whole once its batch is judged. Each
batch has a seed of its own, so a stage that was killed samples only what is not there yet, and just what it would have
sampled.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.rewards import RewardSpec
from configs.sampling import RolloutConfig, SamplingConfig
from pipeline.data.prompts import Prompt, Prompts
from pipeline.disk.files import write_json_lines
from pipeline.evaluation.suites import Judge
from pipeline.preferences.split import prompt_key
from rewards.types import Verdict
from rollout.types import Completion, Group

FILLS_PER_BATCH = 4
"""How often a batch fills the engines' places. The larger, the less they idle at its end, and the more a kill loses."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompts of one source, no two the same, and who judges the answers to them; None asks nobody."""

    prompts: list[Prompt]
    reward: RewardSpec | None


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer. `score` is None where it was not judged, and `outcome` then says why; `ended` is whether the
    model ended it itself."""

    text: str
    num_tokens: int
    ended: bool
    score: float | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its k answers in the order they were drawn."""

    prompt: Prompt
    answers: list[Answer]


class Speaker(Protocol):
    """What answers: the part of `rollout.pool.RolloutPool` that is needed here."""

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        """Groups as they finish; `index` is the prompt's place."""
        ...


@dataclass(frozen=True, slots=True)
class Sampler:
    """Gives the k = `samples` answers to every prompt, from the files below `folder` where they are there already.

    speaker, judge: blocks in which the model speaks and a reward judges; entered only where something is missing.
    """

    folder: Path
    samples: int
    sampling: SamplingConfig
    rollout: RolloutConfig
    seed: int
    speaker: Callable[[], AbstractContextManager[Speaker]]
    judge: Callable[[RewardSpec | None], AbstractContextManager[Judge | None]]

    def answers(self, asked: Mapping[str, Asked]) -> dict[str, list[Answered]]:
        """The answers of every source by its name, in the order of its prompts.

        The same seed, settings and prompts give the same answers, however often the stage was killed on the way. Raises
        what the handles raise, and ValueError where a file holds answers to other prompts.
        """
        missing = {name: one for name, one in asked.items() if any(self._waiting(name, one.prompts))}
        if missing:
            with self.speaker() as speaker:
                for name, one in missing.items():
                    with self.judge(one.reward) as judge:
                        self._fill(name, one, speaker, judge)
        return {name: self._kept(name, one.prompts) for name, one in asked.items()}

    def _batches(self, name: str, prompts: list[Prompt]) -> Iterator[tuple[Path, list[Prompt]]]:
        places = self.rollout.num_engines * self.rollout.max_num_seqs
        size = max(FILLS_PER_BATCH * places // self.samples, 1)
        for number, start in enumerate(range(0, len(prompts), size), start=1):
            yield self.folder / f"{name}-{number:05d}.jsonl", prompts[start : start + size]

    def _waiting(self, name: str, prompts: list[Prompt]) -> Iterator[tuple[Path, list[Prompt]]]:
        return ((file, batch) for file, batch in self._batches(name, prompts) if not file.is_file())

    def _fill(self, name: str, asked: Asked, speaker: Speaker, judge: Judge | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = list(self._waiting(name, asked.prompts))
        total, to_do = len(asked.prompts), sum(len(batch) for _, batch in waiting)
        console = rich.get_console()
        console.print(f"{name}: {self.samples} answers to each of {total} prompts, {total - to_do} answered before")
        columns = (TextColumn(name), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(name, total=total, completed=total - to_do)
            for file, batch in waiting:
                records = self._answer(file.stem, batch, asked.reward, speaker, judge, lambda: progress.advance(bar))
                write_json_lines(file, records)
                to_do -= len(batch)
                if not console.is_terminal:
                    console.print(f"{name}: {total - to_do} of {total} prompts answered and judged")

    def _answer(
        self,
        batch_name: str,
        prompts: list[Prompt],
        reward: RewardSpec | None,
        speaker: Speaker,
        judge: Judge | None,
        advance: Callable[[], None],
    ) -> list[dict[str, Any]]:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{batch_name}".encode()).digest()[:4], "big")
        groups: dict[int, Group] = {}
        ids = [prompt.token_ids for prompt in prompts]
        for group in speaker.generate(ids, self.sampling, self.samples, seed):
            groups[group.index] = group
            if judge is not None and reward is not None:
                task = replace(prompts[group.index].task, kind=reward.label)
                judge.submit(group.index, task, [completion.text for completion in group.completions])
            advance()
        judged = {} if judge is None else judge.gather()
        label = "" if reward is None else reward.label
        return [
            {"row": prompt.task.row, "prompt": prompt.task.prompt, "key": prompt_key(prompt.task.conversation)}
            | {"answers": list(_answers(groups[index].completions, [one[label] for one in judged.get(index, [])]))}
            for index, prompt in enumerate(prompts)
        ]

    def _kept(self, name: str, prompts: list[Prompt]) -> list[Answered]:
        kept: list[Answered] = []
        for file, batch in self._batches(name, prompts):
            with file.open(encoding="utf-8") as lines:  # splitlines() would also split at what JSON leaves in a text
                records = [json.loads(line) for line in lines]
            if [record["key"] for record in records] != [prompt_key(prompt.task.conversation) for prompt in batch]:
                raise ValueError(f"'{file}' holds answers to other prompts than are asked now; remove it")
            for prompt, record in zip(batch, records, strict=True):
                kept.append(Answered(prompt, [Answer(**answer) for answer in record["answers"]]))
        return kept


def distinct(prompts: Prompts) -> list[Prompt]:
    """The prompts, each once: the first of those that only case or white space tells apart."""
    every = (prompts[index] for index in range(len(prompts)))
    first: dict[str, Prompt] = {}
    for prompt in every:
        first.setdefault(prompt_key(prompt.task.conversation), prompt)
    return list(first.values())


def _answers(completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> Iterator[dict[str, Any]]:
    for place, completion in enumerate(completions):
        verdict = verdicts[place] if verdicts else None
        outcome = "" if verdict is None else verdict.outcome if verdict.score is not None else str(verdict.status)
        score = None if verdict is None else verdict.score
        ended = completion.finish_reason == "stop"
        yield asdict(Answer(completion.text, len(completion.token_ids), ended, score, outcome))
