"""Conversations of several turns, each answer scored in its conversation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from transformers import PreTrainedTokenizerFast

from configs.evaluation import ConversationSuite
from pipeline.data.chat import ChatFormat
from pipeline.data.messages import Message
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.rows import BadRowError, Row
from pipeline.evaluation.generation import generate, rates
from pipeline.evaluation.suites import CompletionRecord, DecodingMode, Items, Session, SuiteResult, suite_result
from rewards.types import Status, Task


def conversation_task(suite: ConversationSuite) -> Callable[[Row], Task]:
    """Return a function from a row to the task of its first turn. It raises BadRowError for a row without turns."""

    def task_of(row: Row) -> Task:
        turns = [row.column("question")] if row.values.get("turns") is None else row.column("turns")
        if (
            not isinstance(turns, list)
            or not turns
            or not all(isinstance(turn, str) and turn.strip() for turn in turns)
        ):
            raise BadRowError("no list of turns", f"turns={turns!r}"[:120])
        references = row.values.get("reference") or []
        metadata = row.values | {
            "turns": turns,
            "reference": [references] if isinstance(references, str) else references,
        }
        system: list[Message] = [] if suite.system is None else [{"role": "system", "content": suite.system}]
        task = Task(turns[0], None, row=row.where, metadata=metadata)
        return _turn_task(suite, task, [*system, {"role": "user", "content": turns[0]}], turn=0)

    return task_of


def run_conversations(
    suite: ConversationSuite, prompts: Prompts, tokenizer: PreTrainedTokenizerFast, session: Session
) -> SuiteResult:
    """Generate and score an answer to every turn, with the model's own earlier answers in the prompt.

    A conversation ends early if its next prompt is longer than `max_prompt_length`, or if the last answer is empty or
    spells a special token. Its later turns are unjudged. See `conversation_result` for the figures.
    """
    chat, records = ChatFormat(tokenizer), list[CompletionRecord]()
    active, turn = dict(enumerate(prompts)), 0
    while active:
        answers = _answers(suite, active, session, f"turn {turn + 1}")
        records += answers.values()
        turn += 1
        following: dict[int, Prompt] = {}
        for index, prompt in active.items():
            answer = answers[index]
            if turn < len(prompt.task.metadata["turns"]):
                try:
                    following[index] = _next_prompt(suite, chat, prompt.task, answer.completion, turn)
                except BadRowError as error:
                    records += _unasked(suite, index, prompt.task, turn, error)
        active = following
    ordered = sorted(records, key=lambda record: (record.index, _number(record.row)))
    return conversation_result(ordered, prompts, suite.groups)


def conversation_result(
    records: Sequence[CompletionRecord], prompts: Prompts, groups: Mapping[str, Sequence[str]]
) -> SuiteResult:
    """Return `score_mean` over all answers, `score_mean_turn_<n>`, `score_mean_<category>`, and by groups of categories
    `group_mean_<group>`, the mean of its categories' figures, and `group_mean`, the mean of the groups'.

    An answer's item id is its conversation's row and `#<n>`. A group without a judged category has no figure.
    """
    items: dict[str, Items] = {"score_mean": {}}
    for record in records:
        if record.score is not None:
            category = prompts[record.index].task.metadata.get("category")
            names = ["score_mean", f"score_mean_turn_{_number(record.row)}"]
            for name in [*names, f"score_mean_{category}"] if category else names:
                items.setdefault(name, {})[record.row] = record.score
    result = suite_result(items, [], {}, records)
    means = {
        f"group_mean_{group}": fmean(scores)
        for group, categories in groups.items()
        if (scores := [result.figures[name] for c in categories if (name := f"score_mean_{c}") in result.figures])
    }
    overall = {"group_mean": fmean(means.values())} if means else {}
    return replace(result, figures=result.figures | means | overall | rates(records))


def _answers(
    suite: ConversationSuite, active: Mapping[int, Prompt], session: Session, title: str
) -> dict[int, CompletionRecord]:
    """Answer the active conversations' newest turns, those of a category at its temperature."""
    by_temperature: dict[float, list[int]] = {}
    for index, prompt in active.items():
        temperature = suite.temperatures.get(str(prompt.task.metadata.get("category")), 0.0)
        by_temperature.setdefault(temperature, []).append(index)
    answers: dict[int, CompletionRecord] = {}
    for temperature, indices in by_temperature.items():
        sampling = session.sampling.model_copy(update={"temperature": temperature})
        mode: DecodingMode = "sampled" if temperature else "greedy"
        records = generate([active[i] for i in indices], replace(session, sampling=sampling), mode, 1, title)
        answers |= {index: replace(record, index=index) for index, record in zip(indices, records, strict=True)}
    return {index: answers[index] for index in active}


def _next_prompt(suite: ConversationSuite, chat: ChatFormat, task: Task, answer: str, turn: int) -> Prompt:
    """Return the prompt of turn `turn` (from 0) after `answer`. Raises BadRowError where it is unusable."""
    reply: Message = {"role": "assistant", "content": answer}
    question: Message = {"role": "user", "content": task.metadata["turns"][turn]}
    messages = chat.check([*task.messages, reply, question], last_role="user")
    token_ids = chat.prompt_ids(messages)
    if len(token_ids) > suite.max_prompt_length:
        raise BadRowError("longer than max_prompt_length", f"{len(token_ids)} tokens > {suite.max_prompt_length}")
    return Prompt(token_ids, _turn_task(suite, task, messages, turn))


def _turn_task(suite: ConversationSuite, task: Task, messages: list[Message], turn: int) -> Task:
    """Return the task of turn `turn` (from 0), given the one before; its truth is the row's reference, if any."""
    references = task.metadata["reference"]
    truth = (references[turn] or None) if turn < len(references) else None
    judge = suite.reward if truth is None or suite.reference_reward is None else suite.reference_reward
    return replace(
        task,
        prompt=task.metadata["turns"][turn],
        truth=truth,
        kind=judge.label,
        row=f"{task.row.removesuffix(f'#{turn}')}#{turn + 1}",
        messages=messages,
    )


def _number(row: str) -> int:
    return int(row.rpartition("#")[2])


def _unasked(
    suite: ConversationSuite, index: int, task: Task, turn: int, error: BadRowError
) -> Iterator[CompletionRecord]:
    """Yield unjudged records of turn `turn` and the later ones of a conversation that ended early."""
    for later in range(turn, len(task.metadata["turns"])):
        task = _turn_task(suite, task, [], later)
        yield CompletionRecord(
            index=index,
            row=task.row,
            prompt=task.prompt,
            truth=task.truth,
            completion="",
            status=Status.ABSTAIN,
            outcome="not asked",
            detail=str(error),
        )
