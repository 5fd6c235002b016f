"""Conversations of several turns, each answer scored in its conversation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from configs.evaluation import ConversationSuite
from pipeline.data.chat import ChatFormat
from pipeline.data.messages import Message
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.speaking import rates, speak
from pipeline.evaluation.suites import Items, Record, Session, SuiteResult, result
from rewards.types import Status, Task


def conversation_task(suite: ConversationSuite) -> Callable[[Row], Task]:
    """What makes the task of a row's first turn. It raises BadRowError for a row without turns of text."""

    def task_of(row: Row) -> Task:
        turns = row.column("turns")
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise BadRowError("no list of turns", f"turns={turns!r}"[:120])
        system: list[Message] = [] if suite.system is None else [{"role": "system", "content": suite.system}]
        task = Task(turns[0], None, suite.reward.label, row.where, row.values)
        return _turn(task, [*system, {"role": "user", "content": turns[0]}], turn=0)

    return task_of


def run_conversations(
    suite: ConversationSuite, prompts: Prompts, tokenizer: PreTrainedTokenizerFast, session: Session
) -> SuiteResult:
    """A greedy answer to every turn, the answers before it being the model's own, and its score.

    A conversation ends early where its next turn can't be put: it has become longer than `max_prompt_length`, or the
    answer before is empty or spells a special token. The turns left are unjudged. For the figures see
    `conversation_result`.
    """
    chat, records = ChatFormat(tokenizer), list[Record]()
    going = {i: prompts[i] for i in range(len(prompts))}
    turn = 0
    while going:
        spoken = speak(list(going.values()), session, "greedy", 1, f"turn {turn + 1}")
        spoken = [replace(record, index=i) for i, record in zip(going, spoken, strict=True)]
        turn += 1
        following: dict[int, Prompt] = {}
        for i, answer in zip(list(going), spoken, strict=True):
            turns = going[i].task.metadata["turns"]
            if turn == len(turns):
                continue
            try:
                following[i] = _next(suite, chat, going[i].task, answer.completion, turn)
            except BadRowError as error:
                records += _unspoken(i, going[i].task, turn, error)
        records += spoken
        going = following
    return conversation_result(sorted(records, key=lambda record: (record.index, _number(record.row))), prompts)


def conversation_result(records: Sequence[Record], prompts: Prompts) -> SuiteResult:
    """`score_mean`, the mean score of all answers; `score_mean_turn_<n>`, of each conversation's n-th; and
    `score_mean_<category>`, of those of a category. An answer's item id is its conversation's row and `#<n>`."""
    items: dict[str, Items] = {"score_mean": {}}
    for answer in records:
        if answer.score is None:
            continue
        category = prompts[answer.index].task.metadata.get("category")
        names = ["score_mean", f"score_mean_turn_{_number(answer.row)}"]
        for name in [*names, f"score_mean_{category}"] if category else names:
            items.setdefault(name, {})[answer.row] = answer.score
    return result(items, [], rates(records), records)


def _next(suite: ConversationSuite, chat: ChatFormat, task: Task, answer: str, turn: int) -> Prompt:
    """The prompt of the turn at place `turn`, which follows `answer`. Raises BadRowError where it can't be put."""
    said: Message = {"role": "assistant", "content": answer}
    asked: Message = {"role": "user", "content": task.metadata["turns"][turn]}
    messages = chat.check([*task.messages, said, asked], last_role="user")
    token_ids = chat.prompt_ids(messages)
    if len(token_ids) > suite.max_prompt_length:
        raise BadRowError("longer than max_prompt_length", f"{len(token_ids)} tokens > {suite.max_prompt_length}")
    return Prompt(token_ids, _turn(task, messages, turn))


def _turn(task: Task, messages: list[Message], turn: int) -> Task:
    """The task of the turn at place `turn`, made from the one before; its truth is the row's reference, if any."""
    references = task.metadata.get("reference") or []
    return replace(
        task,
        prompt=task.metadata["turns"][turn],
        truth=references[turn] if turn < len(references) else None,
        row=f"{task.row.removesuffix(f'#{turn}')}#{turn + 1}",
        messages=messages,
    )


def _number(row: str) -> int:
    return int(row.rpartition("#")[2])


def _unspoken(index: int, task: Task, turn: int, error: BadRowError) -> Iterator[Record]:
    """Records of the turns from the place `turn` on, which follow `task`, for a conversation that ended."""
    for place in range(turn, len(task.metadata["turns"])):
        task = _turn(task, [], place)
        yield Record(
            index=index,
            row=task.row,
            prompt=task.prompt,
            truth=task.truth,
            completion="",
            mode="greedy",
            score=None,
            status=Status.ABSTAIN,
            outcome="not asked",
            detail=str(error),
            num_tokens=0,
            truncated=False,
        )
