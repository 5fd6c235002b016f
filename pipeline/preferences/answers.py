"""Answers of a model to prompts: sampled, judged while the engines generate, and stored.

Each batch of prompts has a file in the stage's folder, which appears whole once the batch is judged, and a seed of its
own. A stage that was killed therefore samples the missing batches alone, with the same result.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.rewards import RewardSpec
from configs.sample import judging_rewards
from configs.sampling import RolloutConfig, SamplingConfig
from pipeline.cluster.start import start_all
from pipeline.data.prompts import Prompt, Prompts
from pipeline.disk.files import write_json_lines
from pipeline.preferences.split import prompt_key
from rewards.pool.workers import RewardPool
from rewards.thinking import answer_alone
from rewards.types import Verdict
from rollout.pool import RolloutPool
from rollout.types import StoredCompletion, StoredGroup

FILLS_PER_BATCH = 4
"""Times that a batch fills the engines' places. More means less idling at its end, and more lost to a kill."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The distinct prompts of one source, the reward that judges their answers, if any, and rewards whose gates they
    must pass. reasoning: `drop` judges and returns answers without their thoughts."""

    prompts: list[Prompt]
    reward: RewardSpec | None
    filters: Sequence[RewardSpec] = ()
    reasoning: Literal["keep", "drop"] = "keep"

    @property
    def rewards(self) -> list[RewardSpec]:
        """The reward and the filters."""
        return judging_rewards(self.reward, self.filters)


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer."""

    text: str
    num_tokens: int
    ended: bool
    """True if the model ended the answer, False if `max_tokens` cut it."""
    score: float | None
    """None where it was not judged."""
    outcome: str
    """The judge's word on it, or the reason for a missing score."""
    flaw: str = ""
    """The filter that it does not pass, or "not judged" where a filter failed; "" for none."""


@dataclass(frozen=True, slots=True)
class AnsweredPrompt:
    """A prompt and its k answers in sampling order."""

    prompt: Prompt
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class _Batch:
    file: Path
    prompts: list[Prompt]


@dataclass(frozen=True, slots=True)
class AnswerSampler:
    """Samples k = `samples` answers to every prompt, or reads them from `folder` where they exist.

    start_engines, start_judges: called only where an answer is missing.
    """

    folder: Path
    samples: int
    sampling: SamplingConfig
    rollout: RolloutConfig
    seed: int
    start_engines: Callable[[], RolloutPool]
    start_judges: Callable[[list[RewardSpec]], RewardPool]

    def answers(self, prompt_sets: Mapping[str, PromptSet]) -> dict[str, list[AnsweredPrompt]]:
        """Return the answers of every source by its name, in the order of its prompts.

        The same seed, settings and prompts give the same answers, however often the stage is killed in between. Raises
        ValueError where a file has answers to other prompts, and the exceptions of engines and judges.
        """
        batches = {name: list(self._batches(name, prompt_set.prompts)) for name, prompt_set in prompt_sets.items()}
        if any(not batch.file.is_file() for of_source in batches.values() for batch in of_source):
            self.folder.mkdir(parents=True, exist_ok=True)
            with start_all(self.start_engines) as (engines,):
                for name, of_source in batches.items():
                    self._sample_missing(name, of_source, prompt_sets[name], engines)
        return {name: [answered for batch in batches[name] for answered in _read(batch)] for name in prompt_sets}

    def _batches(self, name: str, prompts: list[Prompt]) -> Iterator[_Batch]:
        places = self.rollout.num_engines * self.rollout.max_num_seqs
        size = max(FILLS_PER_BATCH * places // self.samples, 1)
        for number, start in enumerate(range(0, len(prompts), size), start=1):
            yield _Batch(self.folder / f"{name}-{number:05d}.jsonl", prompts[start : start + size])

    def _sample_missing(self, name: str, batches: list[_Batch], asked: PromptSet, engines: RolloutPool) -> None:
        missing = [batch for batch in batches if not batch.file.is_file()]
        if not missing:
            return
        total = sum(len(batch.prompts) for batch in batches)
        num_answered = total - sum(len(batch.prompts) for batch in missing)
        console = rich.get_console()
        console.print(f"{name}: {self.samples} answers to each of {total} prompts, {num_answered} answered before")
        columns = (TextColumn(name), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            start_all(partial(self.start_judges, asked.rewards)) if asked.rewards else nullcontext([None]) as (judges,),
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            bar = progress.add_task(name, total=total, completed=num_answered)
            for batch in missing:
                records = self._sample(batch, asked, engines, judges, lambda: progress.advance(bar))
                write_json_lines(batch.file, records)
                num_answered += len(batch.prompts)
                if not console.is_terminal:
                    console.print(f"{name}: {num_answered} of {total} prompts answered and judged")

    def _sample(
        self,
        batch: _Batch,
        asked: PromptSet,
        engines: RolloutPool,
        judges: RewardPool | None,
        advance: Callable[[], None],
    ) -> list[dict[str, Any]]:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{batch.file.stem}".encode()).digest()[:4], "big")
        groups: dict[int, StoredGroup] = {}
        texts: dict[int, list[str]] = {}
        prompt_ids = [prompt.token_ids for prompt in batch.prompts]
        kind = " ".join(spec.label for spec in asked.rewards)
        for group in engines.generate(prompt_ids, self.sampling, self.samples, seed):
            groups[group.index] = group
            of_group = [completion.text for completion in group.completions]
            texts[group.index] = [answer_alone(text) for text in of_group] if asked.reasoning == "drop" else of_group
            if judges is not None:
                judges.submit(group.index, replace(batch.prompts[group.index].task, kind=kind), texts[group.index])
            advance()
        group_verdicts = {} if judges is None else judges.gather()
        return [
            {
                "row": prompt.task.row,
                "prompt": prompt.task.prompt,
                "key": prompt_key(prompt.task.conversation),
                "answers": _answers(groups[index].completions, texts[index], group_verdicts.get(index, []), asked),
            }
            for index, prompt in enumerate(batch.prompts)
        ]


def distinct_prompts(prompts: Prompts) -> list[Prompt]:
    """Drop prompts that differ from an earlier one in case or white space alone."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt_key(prompt.task.conversation), prompt)
    return list(first.values())


def _read(batch: _Batch) -> list[AnsweredPrompt]:
    with batch.file.open(encoding="utf-8") as lines:  # splitlines() would split at separators within a JSON text too
        records = [json.loads(line) for line in lines]
    if [record["key"] for record in records] != [prompt_key(prompt.task.conversation) for prompt in batch.prompts]:
        raise ValueError(f"'{batch.file}' has answers to other prompts than those of this stage; remove it")
    return [
        AnsweredPrompt(prompt, [Answer(**answer) for answer in record["answers"]])
        for prompt, record in zip(batch.prompts, records, strict=True)
    ]


def _answers(
    completions: Sequence[StoredCompletion],
    texts: Sequence[str],
    verdicts: Sequence[Mapping[str, Verdict]],
    asked: PromptSet,
) -> list[dict[str, Any]]:
    answers: list[Answer] = []
    for index, (completion, text) in enumerate(zip(completions, texts, strict=True)):
        score, outcome, flaw = None, "", ""
        if asked.reward is not None:
            verdict = verdicts[index][asked.reward.label]
            score = verdict.score
            outcome = str(verdict.status) if score is None else verdict.outcome
        for spec in reversed(asked.filters):
            passed = verdicts[index][spec.label].score
            if passed is None or (spec.gate is not None and passed < spec.gate):
                flaw = "not judged" if passed is None else f"filter {spec.label}"
        ended = completion.finish_reason == "stop"
        answers.append(Answer(text, completion.num_tokens, ended, score, outcome, flaw))
    return [asdict(answer) for answer in answers]
