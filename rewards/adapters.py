"""Reward functions of TRL, verl and OpenRLHF, run as they are.

Each is called the way its own library calls it (TRL 1.10, verl 0.9, OpenRLHF 0.11), by what a task holds: `prompt`,
`truth`, and the row's columns in `metadata`. What these libraries pass from inside their trainers does not exist here:
a function that can't do without it is refused before anything starts.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rewards.plugins import check_args, check_call, describe
from rewards.types import ContractError, Status, Task, Verdict

WRITTEN_FOR = {"completions": "trl", "solution_str": "verl", "queries": "openrlhf"}
"""By which parameter a function is known to be written for another library."""

_INSIDE_TRL = {
    "completion_ids": "token ids do not reach a reward",
    "trainer_state": "there is no transformers trainer",
    "environments": "there are no environments",
}
_TRL_LOGS = ("log_extra", "log_metric")
_TRL_RESERVED = ("prompts", "completions", *_INSIDE_TRL, *_TRL_LOGS)
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")


def adapt(library: str, function: Any, args: Mapping[str, Any]) -> Any:
    """The reward that `function`, written for `library`, is for us. `args` go to it as keyword arguments.

    Raises ValueError where it is no function, or one that can't be called as `library` would.
    """
    if inspect.isclass(function) or not callable(function):
        kind = "class" if inspect.isclass(function) else type(function).__name__
        raise ValueError(f"'{library}:' goes before the name of a function, not of a {kind}")
    return {"trl": TRLReward, "verl": VerlReward, "openrlhf": OpenRLHFReward}[library](function, args)


class TRLReward:
    """`f(prompts, completions, **columns) -> list[float | None]`, sync or async; None abstains.

    As in TRL, everything is passed by keyword, and where the row's column `prompt` is a list of messages, prompts and
    completions are lists of messages too. What the function logs through `log_extra` and `log_metric` is dropped.
    """

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        parameters = inspect.signature(function).parameters
        required = [name for name, parameter in parameters.items() if _is_required(parameter) and name not in args]
        for name in required:
            if name in _INSIDE_TRL:
                raise ValueError(f"{describe(function)} needs '{name}', but {_INSIDE_TRL[name]} here")
        check_args(function, args, given=_TRL_RESERVED)
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._parameters = set(parameters) - set(args)
        self._columns = [name for name in required if name not in _TRL_RESERVED]
        self._written = describe(function)
        self.pool = getattr(function, "pool", "rule")
        self.score_batch = _composed(partial(function, **args), self._keywords, _each)

    def check(self, task: Task) -> None:
        """Raises ValueError where the row lacks a column that the function can't do without."""
        for name in self._columns:
            if name not in task.metadata:
                has = ", ".join(sorted(set(task.metadata) - set(_NOT_COLUMNS))) or "(none)"
                raise ValueError(f"{self._written} needs the column '{name}'; the row's columns are: {has}")

    def _keywords(self, tasks: Sequence[Task], completions: Sequence[str]) -> dict[str, Any]:
        """What TRL would pass, as far as the function takes it."""
        columns = {name: [task.metadata[name] for task in tasks] for name in tasks[0].metadata}
        is_chat = isinstance(tasks[0].metadata.get("prompt"), list)
        passed: dict[str, Any] = {
            **{name: values for name, values in columns.items() if name not in _NOT_COLUMNS},
            **dict.fromkeys(_TRL_LOGS, _drop),
            "prompts": columns["prompt"] if is_chat else [task.prompt for task in tasks],
            "completions": [[{"role": "assistant", "content": text}] if is_chat else text for text in completions],
        }
        return {name: value for name, value in passed.items() if self._takes_all or name in self._parameters}


class VerlReward:
    """`compute_score(data_source, solution_str, ground_truth, extra_info)`, sync or async: a number, or a dict with it
    under `score`.

    `data_source` and `extra_info` are columns of the row; the truth is taken out of verl's column `reward_model` where
    that is the truth column. As in verl, args go before what the row says.
    """

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        check_args(function, args)
        passed = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
        form = f"{getattr(function, '__name__', 'compute_score')}({', '.join(f'{name}=...' for name in passed)})"
        check_call(function, form, **{**passed, **args})
        self._args = args
        self.pool = getattr(function, "pool", "rule")
        self.score = _composed(function, self._keywords, _score_of)

    def check(self, task: Task) -> None:
        """Raises ValueError where the row has no truth, and where neither it nor args say where it comes from."""
        if task.truth is None and self._args.get("ground_truth") is None:
            raise ValueError(
                "the row has no truth, so ground_truth would be None: name its column by prompts.truth, or on the "
                "command line by --truth, as in --truth reward_model"
            )
        if "data_source" not in task.metadata and "data_source" not in self._args:
            raise ValueError(
                "the row has no column 'data_source', by which verl's functions tell sets of data apart; "
                "add it, or set args.data_source"
            )

    def _keywords(self, task: Task, completion: str) -> dict[str, Any]:
        truth = task.truth
        return {
            "data_source": task.metadata.get("data_source"),
            "solution_str": completion,
            "ground_truth": truth["ground_truth"] if isinstance(truth, dict) and "ground_truth" in truth else truth,
            "extra_info": dict(task.metadata.get("extra_info") or {}),
            **self._args,
        }


class OpenRLHFReward:
    """`reward_func(queries, prompts, labels)`: for one completion at a time, as OpenRLHF has it, a list, a tensor, or a
    dict with it under `rewards`.

    A query is the prompt's text followed by the completion's; there is no chat template in either.
    """

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        check_args(function, args, given=list(inspect.signature(function).parameters)[:3])
        form = f"{getattr(function, '__name__', 'reward_func')}(queries, prompts, labels)"
        check_call(function, form, "queries", "prompts", "labels", **args)
        self._function = partial(function, **args)
        self.pool = getattr(function, "pool", "rule")

    def score(self, task: Task, completion: str) -> Any:
        """The one reward. Raises KeyError where a dict lacks it, ContractError where there is not exactly one."""
        result = self._function([task.prompt + completion], [task.prompt], [task.truth])
        values = _plain(result["rewards"] if isinstance(result, dict) else result)
        if not isinstance(values, list | tuple):
            return values
        if len(values) != 1:
            raise ContractError(f"{len(values)} rewards came back for 1 completion")
        return values[0]


def _composed(
    function: Callable[..., Any], arrange: Callable[..., dict[str, Any]], finish: Callable[[Any], Any]
) -> Any:
    """`finish(function(**arrange(...)))`, a coroutine function where `function` is one."""

    def judge(*given: Any) -> Any:
        return finish(function(**arrange(*given)))

    async def judge_async(*given: Any) -> Any:
        return finish(await function(**arrange(*given)))

    return judge_async if inspect.iscoroutinefunction(function) else judge


def _each(results: Any) -> list[Any]:
    abstained = Verdict(None, Status.ABSTAIN, "the function returned None")
    values = _plain(results)
    if not isinstance(values, list | tuple):
        raise ContractError(f"a {type(results).__name__} came back, not a list with a reward for each completion")
    return [abstained if value is None else _plain(value) for value in values]


def _score_of(result: Any) -> Any:
    return _plain(result["score"] if isinstance(result, dict) else result)


def _plain(value: Any) -> Any:
    """Numbers and lists out of whatever array library they come from."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return named and parameter.default is parameter.empty


def _drop(*_: Any) -> None:
    """What stands in for TRL's loggers."""
