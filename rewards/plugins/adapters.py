"""Reward functions written for TRL, verl and OpenRLHF, run unchanged.

Each is called as its own library calls it (TRL 1.10, verl 0.9, OpenRLHF 0.11), with what a task holds: `prompt`,
`truth`, and the row's columns in `metadata`. A function that needs an object of the library's trainer is refused before
anything starts.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from rewards.plugins.names import check_args, check_call, describe
from rewards.types import ContractError, Status, Task, Verdict

_MISSING_IN_TRL = {
    "completion_ids": "token ids do not reach a reward",
    "trainer_state": "there is no transformers trainer",
    "environments": "there are no environments",
}
_TRL_LOGGERS = ("log_extra", "log_metric")
_TRL_RESERVED = ("prompts", "completions", *_MISSING_IN_TRL, *_TRL_LOGGERS)
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")


def adapt(library: str, function: Any, args: Mapping[str, Any]) -> Any:
    """The reward made of `function`, which was written for `library`. `args` become its keyword arguments.

    Raises ValueError for anything but a function, and for one that can't be called as `library` would.
    """
    if inspect.isclass(function) or not callable(function):
        kind = "class" if inspect.isclass(function) else type(function).__name__
        raise ValueError(f"'{library}:' goes before the name of a function, not of a {kind}")
    return ADAPTERS[library](function, args)


class TRLReward:
    """`f(prompts, completions, **columns) -> list[float | None]`, sync or async; None abstains.

    As in TRL, every argument is passed by keyword, and where the row's column `prompt` is a list of messages, prompts
    and completions are lists of messages too. Calls of `log_extra` and `log_metric` have no effect.
    """

    completions: ClassVar = "completions"
    """The parameter for the completions, by which a function for this library is recognised."""

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        parameters = inspect.signature(function).parameters
        required = [name for name, parameter in parameters.items() if _is_required(parameter) and name not in args]
        for name in required:
            if name in _MISSING_IN_TRL:
                raise ValueError(f"{describe(function)} needs '{name}', but {_MISSING_IN_TRL[name]} here")
        check_args(function, args, reserved=_TRL_RESERVED)
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._parameters = set(parameters) - set(args)
        self._columns = [name for name in required if name not in _TRL_RESERVED]
        self._signature = describe(function)
        self.pool = getattr(function, "pool", "rule")
        self.score_batch = _compose(self._keywords, partial(function, **args), _results)

    def check(self, task: Task) -> None:
        """Raises ValueError where the row lacks a column that the function requires."""
        for name in self._columns:
            if name not in task.metadata:
                columns = ", ".join(sorted(set(task.metadata) - set(_NOT_COLUMNS))) or "(none)"
                raise ValueError(f"{self._signature} needs the column '{name}'; the row's columns are: {columns}")

    def _keywords(self, tasks: Sequence[Task], completions: Sequence[str]) -> dict[str, Any]:
        """TRL's arguments, as far as the function takes them."""
        columns = {name: [task.metadata[name] for task in tasks] for name in tasks[0].metadata}
        is_chat = isinstance(tasks[0].metadata.get("prompt"), list)
        keywords: dict[str, Any] = {
            **{name: values for name, values in columns.items() if name not in _NOT_COLUMNS},
            **dict.fromkeys(_TRL_LOGGERS, lambda *_: None),
            "prompts": columns["prompt"] if is_chat else [task.prompt for task in tasks],
            "completions": [[{"role": "assistant", "content": text}] if is_chat else text for text in completions],
        }
        return {name: value for name, value in keywords.items() if self._takes_all or name in self._parameters}


class VerlReward:
    """`compute_score(data_source, solution_str, ground_truth, extra_info)`, sync or async: a number, or a dict with it
    under `score`.

    `data_source` and `extra_info` are columns of the row. Where the truth is verl's column `reward_model`, its
    `ground_truth` is passed. As in verl, args override the row.
    """

    completions: ClassVar = "solution_str"

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        check_args(function, args)
        keywords = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
        call = f"{getattr(function, '__name__', 'compute_score')}({', '.join(f'{name}=...' for name in keywords)})"
        check_call(function, call, **{**keywords, **args})
        self._args = args
        self.pool = getattr(function, "pool", "rule")
        self.score = _compose(self._keywords, function, _number_in("score"))

    def check(self, task: Task) -> None:
        """Raises ValueError where neither the row nor args hold a truth or a data source."""
        if task.truth is None and self._args.get("ground_truth") is None:
            raise ValueError(
                "the row has no truth, so ground_truth would be None: name its column by prompts.truth, or on the "
                "command line by --truth, as in --truth reward_model"
            )
        if "data_source" not in task.metadata and "data_source" not in self._args:
            raise ValueError(
                "the row has no column 'data_source', by which verl's functions tell data sets apart; add it, or set "
                "args.data_source"
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
    """`reward_func(queries, prompts, labels)`, called with one completion as in OpenRLHF: a number, a list or tensor
    with one, or a dict with it under `rewards`.

    A query is the prompt's text followed by the completion, without a chat template.
    """

    completions: ClassVar = "queries"

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        check_args(function, args, reserved=list(inspect.signature(function).parameters)[:3])
        call = f"{getattr(function, '__name__', 'reward_func')}(queries, prompts, labels)"
        check_call(function, call, "queries", "prompts", "labels", **args)
        self._function = partial(function, **args)
        self.pool = getattr(function, "pool", "rule")

    def score(self, task: Task, completion: str) -> Any:
        """The reward. Raises KeyError for a dict without it, ContractError for several rewards or none."""
        values = _number_in("rewards")(self._function([task.prompt + completion], [task.prompt], [task.truth]))
        if not isinstance(values, list | tuple):
            return values
        if len(values) != 1:
            raise ContractError(f"{len(values)} rewards came back for 1 completion")
        return values[0]


ADAPTERS = {"trl": TRLReward, "verl": VerlReward, "openrlhf": OpenRLHFReward}


def _compose(
    keywords: Callable[..., dict[str, Any]], function: Callable[..., Any], convert: Callable[[Any], Any]
) -> Any:
    """`convert(function(**keywords(...)))`, as a coroutine function where `function` is one."""

    def score(*task_and_completion: Any) -> Any:
        return convert(function(**keywords(*task_and_completion)))

    async def score_async(*task_and_completion: Any) -> Any:
        return convert(await function(**keywords(*task_and_completion)))

    return score_async if inspect.iscoroutinefunction(function) else score


def _results(values: Any) -> list[Any]:
    """TRL's rewards of a group, with a verdict in the place of each None."""
    rewards = _plain(values)
    if not isinstance(rewards, list | tuple):
        raise ContractError(f"a {type(values).__name__} came back, not a list with a reward for each completion")
    abstention = Verdict(None, Status.ABSTAIN, "the function returned None")
    return [abstention if reward is None else _plain(reward) for reward in rewards]


def _number_in(key: str) -> Callable[[Any], Any]:
    """A function that takes the result as it is, or its `key` where it is a dict."""
    return lambda result: _plain(result[key] if isinstance(result, dict) else result)


def _plain(value: Any) -> Any:
    """Numbers and lists from arrays and tensors; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    )
