"""Tasks of the lm-evaluation-harness."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from configs.base import neighbour
from configs.evaluation import LMEvalSuite
from pipeline.evaluation.suites import CompletionRecord, Items, Session, SuiteResult, suite_result
from rewards.types import Status

FEWSHOT_SEED = 1234
"""Seed that draws the worked examples, the harness's own."""


def check_harness(suite: LMEvalSuite) -> None:
    """Raise ValueError where the harness isn't installed."""
    if find_spec("lm_eval") is None:
        raise ValueError(f"task='{suite.task}' needs the lm-evaluation-harness: pip install 'alignyard[lm-eval]'")


def load_harness(suite: LMEvalSuite) -> Any:
    """Load a task with its documents, or the tasks of a group, in the harness's form.

    Raises ValueError for a task that is unknown or can't be loaded, and for one that runs the model's code outside of a
    sandbox.
    """
    check_harness(suite)
    own = suite.task.endswith((".yaml", ".yml"))
    manager = _manager(include_defaults=not own)
    if not own and suite.task not in manager.all_tasks:
        raise ValueError(
            f"task='{suite.task}': the harness has no such task; {neighbour(suite.task, manager.all_tasks)}"
        )
    if suite.data_files and suite.task not in manager.all_subtasks:
        raise ValueError(f"data_files: '{suite.task}' is several tasks; name one of them")
    try:
        loaded = manager.load([_with_files(suite) if suite.data_files else suite.task])
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"task='{suite.task}' can't be loaded: {type(error).__name__}: {error}; install its requirements; "
            "without access to the hub, give its documents by data_files"
        ) from error
    for task in loaded["tasks"].values():
        if suite.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", suite.num_fewshot or 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"task='{suite.task}' runs the model's code outside of a sandbox; take the suite human_eval, mbpp, or "
                "one of type task with the reward 'code'"
            )
    return loaded


def run_harness(suite: LMEvalSuite, loaded: Any, tokenizer: PreTrainedTokenizerFast, session: Session) -> SuiteResult:
    """Run the tasks and return the harness's own figures, under its names (`acc`, `exact_match,strict-match`).

    The figures of several tasks are means over all their documents, or `<task>/<metric>` where a mean is not possible.
    An item is a document; its id is its task and its index.
    """
    from lm_eval.evaluator import evaluate

    from pipeline.evaluation.harness_model import EngineModel

    model = EngineModel(tokenizer, session, chat=suite.chat, window_tokens=suite.window_tokens)
    evaluated: Any = evaluate(
        model,
        loaded,
        limit=suite.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=suite.chat,
        fewshot_as_multiturn=suite.chat,
    )
    rates = {"truncated_rate": model.num_truncated / model.num_completions} if model.num_completions else {}
    return harness_result(evaluated["results"], evaluated["samples"], rates)


def harness_result(
    figures: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    rates: dict[str, float],
) -> SuiteResult:
    """Convert the harness's figures, by task and `<metric>,<filter>`, and its samples by task.

    A metric has items only where their mean is the harness's figure. An item is the value of a document, or one value
    of a document's list (IFEval's instructions).
    """
    items: dict[str, Items] = {}
    rest: dict[str, float] = {}
    for task, task_figures in figures.items():
        for key, value in task_figures.items():
            metric, _, filter_name = key.partition(",")
            if not isinstance(value, int | float) or not filter_name or metric.endswith("_stderr"):
                continue
            name = metric if filter_name == "none" else key
            filtered = [sample for sample in samples[task] if sample["filter"] == filter_name]
            values = dict(_values(task, metric, filtered))
            if values and abs(sum(values.values()) / len(values) - value) < 1e-9:
                items.setdefault(name, {}).update(values)
            else:
                rest[name if len(figures) == 1 else f"{task}/{name}"] = float(value)
    shares = [name for name, values in items.items() if set(values.values()) <= {0.0, 1.0} and not _nested(values)]
    records = [_record(index, task, sample) for task in samples for index, sample in enumerate(samples[task])]
    return suite_result(items, shares, rest | rates, records)


@cache
def _manager(*, include_defaults: bool) -> Any:
    """Return the harness's index of tasks, cached because reading its 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager  # takes seconds to import

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=include_defaults)


def _with_files(suite: LMEvalSuite) -> dict[str, Any]:
    """Wrap the task in a group of one, the harness's way to override a task's settings."""
    suffix = Path(next(iter(suite.data_files.values()))).suffix
    source = {
        "dataset_path": "parquet" if suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": suite.data_files},
    }
    return {"group": f"{suite.task} of files", "task": [{"task": suite.task, **source}]}


def _values(task: str, metric: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for sample in samples:
        value, item = sample.get(metric), f"{task}:{sample['doc_id']}"
        if isinstance(value, bool | int | float):
            yield item, float(value)
        elif isinstance(value, list):
            yield from ((f"{item}#{index}", float(part)) for index, part in enumerate(value))


def _nested(items: Items) -> bool:
    return any("#" in item.rpartition(":")[2] for item in items)


def _record(index: int, task: str, sample: Mapping[str, Any]) -> CompletionRecord:
    """Record a sample. Its score is its first metric that is a number."""
    numbers = {key: float(sample[key]) for key in sample["metrics"] if isinstance(sample[key], bool | int | float)}
    response = sample["resps"][0][0]
    return CompletionRecord(
        index=index,
        row=f"{task}:{sample['doc_id']}",
        prompt=str(sample["arguments"][0][0]),
        truth=sample["target"],
        completion=response if isinstance(response, str) else str(sample["resps"]),
        score=next(iter(numbers.values()), None),
        status=Status.OK if numbers else Status.ABSTAIN,
        detail="" if sample["filter"] == "none" else f"filter {sample['filter']}",
        parts=dict(numbers),
    )
