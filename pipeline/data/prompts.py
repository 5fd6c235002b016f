"""Load and tokenise prompts with the tasks that they pose."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from configs.data import COLUMN, GymSource, PromptData, Source
from pipeline.data.chat import ChatFormat
from pipeline.data.messages import has_tools, text_only
from pipeline.data.order import batch_indices
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows
from rewards.pool.guard import Judges
from rewards.types import Task


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids up to the beginning of the answer, and the task."""

    token_ids: list[int]
    task: Task


class Prompts:
    """The good rows of a source, and the record of the bad ones.

    Example: `Prompts.load(config, tokenizer, seed=0).take(step=1, num_prompts=8)`
    """

    def __init__(self, prompts: list[Prompt], bad_rows: BadRows, seed: int):
        self._prompts = prompts
        self.bad_rows = bad_rows
        self._seed = seed

    @classmethod
    def load(cls, config: PromptData, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> "Prompts":
        """Read and tokenise `config.source`; `seed` decides the order of `take`.

        Raises ValueError for an unreadable source, a share of bad rows above `config.max_bad_share`, and a tokenizer
        without chat template.
        """
        chat = ChatFormat(tokenizer)
        return cls.read(config.source, lambda row: _prompt(config, chat, row), config.max_bad_share, seed)

    @classmethod
    def read(
        cls, source: Source, prompt_of: Callable[[Row], Prompt | None], max_bad_share: float, seed: int
    ) -> "Prompts":
        """Make a prompt of each row of `source` by `prompt_of`, which raises BadRowError for a bad one and returns None
        for one that is left out.

        Raises ValueError for an unreadable source, or more than `max_bad_share` of bad rows.
        """
        bad_rows, prompts = BadRows(), list[Prompt]()
        for row in read_rows(source, bad_rows):
            try:
                if (prompt := prompt_of(row)) is not None:
                    prompts.append(prompt)
            except BadRowError as error:
                bad_rows.add(row.where, error)
        bad_rows.check(max_bad_share)
        return cls(prompts, bad_rows, seed)

    def without(
        self, problems: Sequence[str | None], max_bad_share: float, reason: str = "cannot be judged"
    ) -> "Prompts":
        """Return the prompts that have no problem, and count the others as bad rows. Raises ValueError for too many."""
        bad_rows = BadRows.from_state(self.bad_rows.state())
        for prompt, problem in zip(self._prompts, problems, strict=True):
            if problem is not None:
                bad_rows.add(prompt.task.row, BadRowError(reason, problem))
        bad_rows.check(max_bad_share)
        good = [prompt for prompt, problem in zip(self._prompts, problems, strict=True) if problem is None]
        return Prompts(good, bad_rows, self._seed)

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def take(self, step: int, num_prompts: int) -> list[Prompt]:
        """Return the prompts of a step, which counts from 1; the same for every call."""
        return [self[index] for index in batch_indices(step, num_prompts, len(self), self._seed)]


def judgeable(data: PromptData, judges: Judges, tokenizer: PreTrainedTokenizerFast, seed: int) -> Prompts:
    """Load the prompts of `data` that `judges` can judge; the others are bad rows."""
    prompts = Prompts.load(data, tokenizer, seed)
    return prompts.without(judges.problems([prompt.task for prompt in prompts]), data.max_bad_share)


def _prompt(config: PromptData, chat: ChatFormat, row: Row) -> Prompt:
    messages = row.column(config.prompt)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if config.system is not None and isinstance(messages, list):
        messages = [{"role": "system", "content": config.system}, *messages]
    messages = text_only(chat.check(messages, last_role="user"))
    if has_tools(row.values.get("tools")):
        raise BadRowError("tools in a prompt", "a rollout calls none; remove or rename the column 'tools'")
    token_ids = chat.prompt_ids(messages)
    if len(token_ids) > config.max_prompt_length:
        raise BadRowError("longer than max_prompt_length", f"{len(token_ids)} tokens > {config.max_prompt_length}")
    task = Task(
        prompt=messages[-1]["content"],
        truth=_truth(config, row),
        kind=_kind(config, row),
        row=row.where,
        metadata=row.values["metadata"] if isinstance(config.source, GymSource) else row.values,
        messages=messages,
    )
    return Prompt(token_ids, task)


def _kind(config: PromptData, row: Row) -> str:
    if config.reward is None or not config.reward.startswith(COLUMN):
        return config.reward or ""
    label = row.column(config.reward.removeprefix(COLUMN))
    if not isinstance(label, str):
        raise BadRowError("no name of a reward", f"{label!r}"[:120])
    return label


def _truth(config: PromptData, row: Row) -> Any:
    if isinstance(config.source, GymSource):  # tasks without a single answer have no truth, and their own verifier
        return row.values["truth"]
    if config.truth is None:
        return None
    verl = row.values.get("reward_model")  # verl's rows have the truth in there
    if config.truth == "truth" and "truth" not in row.values and isinstance(verl, dict) and "ground_truth" in verl:
        return Row(row.where, verl).column("ground_truth")
    truth = row.column(config.truth)
    if truth in ("", []):
        raise BadRowError("empty truth")
    return truth
