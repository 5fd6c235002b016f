"""Load and tokenise conversations for supervised training, memory-mapped."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from configs.data import ConversationData
from configs.environment import VALUES
from pipeline.data.chat import ChatFormat
from pipeline.data.order import batch_indices
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows, remote_files, source_files
from pipeline.disk.files import new_folder

_FEATURES = Features({"token_ids": List(Value("int32")), "loss_mask": List(Value("int8")), "where": Value("string")})

PROMPT_AND_ANSWER = (
    ("prompt", "completion"), ("prompt", "response"), ("instruction", "response"), ("question", "answer"),
    ("query", "response"),
)  # fmt: skip
"""Pairs of columns that hold a prompt and its answer in data sets."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation: `loss_mask` [T] is 1 for learned tokens of `token_ids` [T]; `where` is its row."""

    token_ids: list[int]
    loss_mask: list[int]
    where: str


class Conversations:
    """The good rows of a source, tokenised, and the record of the bad ones.

    Example: `Conversations.load(config, tokenizer, cache=None, seed=0).take(step=1, batch_size=8)`
    """

    def __init__(self, examples: Dataset, bad_rows: BadRows, seed: int):
        self._examples = examples
        self.bad_rows = bad_rows
        self._seed = seed

    @classmethod
    def load(
        cls, config: ConversationData, tokenizer: PreTrainedTokenizerFast, cache: Path | None = None, seed: int = 0
    ) -> "Conversations":
        """Read and tokenise `config.source`; `seed` decides the order of `take`.

        The tokens are written to a memory-mapped Arrow file below the folder `cache`, and reused for the same settings,
        tokenizer and source files; None keeps them in memory. Raises ValueError for an unreadable source, a share of
        bad rows above `config.max_bad_share`, and a chat template that can't be used.
        """
        bad_rows = BadRows()
        if cache is None:
            examples = [asdict(example) for example in tokenised(config, tokenizer, bad_rows)]
            bad_rows.check(config.max_bad_share)
            return cls(Dataset.from_list(examples, features=_FEATURES), bad_rows, seed)
        folder = cache / f"conversations-{_fingerprint(config, tokenizer)}"
        if not folder.is_dir():
            with new_folder(folder) as partial:
                with ArrowWriter(features=_FEATURES, path=str(partial / "examples.arrow")) as writer:
                    for example in tokenised(config, tokenizer, bad_rows):
                        writer.write(asdict(example))
                    writer.finalize()
                bad_rows.check(config.max_bad_share)
                (partial / "bad_rows.json").write_text(json.dumps(bad_rows.state()), encoding="utf-8")
        bad_rows = BadRows.from_state(json.loads((folder / "bad_rows.json").read_text(encoding="utf-8")))
        return cls(Dataset.from_file(str(folder / "examples.arrow")), bad_rows, seed)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return Example(**self._examples[index])

    def take(self, step: int, batch_size: int) -> list[Example]:
        """Return the examples of a step, which counts from 1; the same for every call."""
        return [self[index] for index in batch_indices(step, batch_size, len(self), self._seed)]


def tokenised(config: ConversationData, tokenizer: PreTrainedTokenizerFast, bad_rows: BadRows) -> Iterator[Example]:
    """Yield the conversations of a source as token ids with their loss mask; bad rows go to `bad_rows`."""
    chat = ChatFormat(tokenizer)
    for row in read_rows(config.source, bad_rows):
        try:
            messages = chat.check(messages_of(config, row, bad_rows), last_role="assistant")
            tools = row.values.get(config.tools) if config.tools is not None else None
            token_ids, loss_mask = chat.training_ids(
                messages,
                chat.check_tools(tools) if tools else None,
                config.reasoning,
                doubt=partial(bad_rows.doubt, row.where),
            )
            if len(token_ids) > config.max_length:
                raise BadRowError("longer than max_length", f"{len(token_ids)} tokens > {config.max_length}")
        except BadRowError as error:
            bad_rows.add(row.where, error)
        else:
            yield Example(token_ids, loss_mask, row.where)


def messages_of(config: ConversationData, row: Row, bad_rows: BadRows) -> Any:
    """Return the conversation of a row, from the columns that `config` names. A row without the column `messages` is
    recognised by its columns, and counted in `bad_rows.forms`: ShareGPT, Alpaca, a prompt and an answer.

    Raises BadRowError for a row of another form, naming the settings that read it.
    """
    if config.prompt is not None and config.answer is not None:
        return _turn(row.column(config.prompt), row.column(config.answer))
    if config.messages != "messages" or row.values.get("messages") is not None:
        return row.column(config.messages)
    for column in ("conversations", "conversation"):
        if isinstance(row.values.get(column), list):
            bad_rows.forms[f"conversations of the column '{column}'"] += 1
            return row.column(column)
    for prompt, answer in PROMPT_AND_ANSWER:
        if row.values.get(prompt) is not None and row.values.get(answer) is not None:
            bad_rows.forms[f"'{prompt}' and its answer '{answer}'"] += 1
            return _turn(row.column(prompt), row.column(answer))
    if row.values.get("instruction") is not None and row.values.get("output") is not None:
        bad_rows.forms["Alpaca's rows (system, history, instruction, input, output)"] += 1
        return _alpaca(row.values)
    remedy = "name the column of the conversation by data.messages, or those of one turn by data.prompt and data.answer"
    raise BadRowError("missing field", f"'messages' is not among {sorted(row.values)}"[:120] + f"; {remedy}")


def _turn(prompt: Any, answer: Any) -> Any:
    """Join a prompt and an answer, each text or a list of messages."""
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return before + (answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}])


def _alpaca(values: dict[str, Any]) -> list[dict[str, Any]]:
    system, history, more = (values.get(name) for name in ("system", "history", "input"))
    messages = [{"role": "system", "content": system}] if system else []
    for turn in history or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRowError("history that is no list of [question, answer]", f"{turn!r}"[:80])
        messages += _turn(*turn)
    question = f"{values['instruction']}\n\n{more}" if more else values["instruction"]
    return messages + _turn(question, values["output"])


def _fingerprint(config: ConversationData, tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash everything that the tokens depend on; of files, their name, size and modification time."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source_files(config.source)]
    files += list(remote_files(config.source).items())
    origin = [
        config.model_dump(context=VALUES),
        files,
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.get_chat_template(),
    ]
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
