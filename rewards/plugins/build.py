"""Building a reward from its spec. Every spec is built once before a run loads a model, so a wrong one fails here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import getsourcefile, isclass, signature
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from configs.base import problems
from configs.rewards import RewardSpec
from rewards.plugins.adapters import ADAPTERS, adapt
from rewards.plugins.names import check_args, check_call, describe, describe_error, import_reward, locate
from rewards.types import Reward

_METHODS = {
    "score": ("task", "completion"),
    "score_batch": ("tasks", "completions"),
    "score_list": ("task", "completions"),
    "setup": (),
    "check": ("task",),
    "time_limit": ("task",),
}
"""Methods that a reward may have, with their arguments."""


@dataclass(frozen=True, slots=True)
class FunctionReward:
    """A plain function as a reward, a rule unless it has an attribute such as `function.pool = "model"`."""

    score: Callable[..., Any]
    pool: str


def build_reward(spec: RewardSpec) -> Reward:
    """The reward that `spec` names, made with its arguments.

    A function `f(task, completion, **args)` is called as it stands, a class is constructed with the arguments, and a
    function for another library is adapted.

    Raises ValueError, with the reward's name and the file and line of the fault, for an unknown name, a module that
    can't be imported, a signature that doesn't fit, and an unknown or wrong argument.

    Example:
        build_reward(RewardSpec(name="length", args={"longest": 50})).score(task, "a short answer")
    """
    place = locate(spec.name)
    try:
        reward = _build(place.library, import_reward(place), spec.args)
    except ValueError as error:
        raise ValueError(f"reward '{spec.name}': {error}") from error
    return cast(Reward, reward)


def _build(library: str, function: Any, args: Mapping[str, Any]) -> Any:
    if library:
        return adapt(library, function, args)
    if isclass(function):
        return _construct(function, args)
    if not callable(function):
        raise ValueError(f"is of type {type(function).__name__}: neither a function nor a class")
    parameters = list(signature(function).parameters)
    for name, adapter in ADAPTERS.items():
        if adapter.completions in parameters:
            raise ValueError(f"{describe(function)} is written for {name}: put '{name}:' before its name")
    check_args(function, args, reserved=parameters[:2])
    arguments = ", ".join(["task, completion", *(f"{key}=..." for key in args)])
    check_call(function, f"{getattr(function, '__name__', 'score')}({arguments})", "task", "completion", **args)
    return FunctionReward(partial(function, **args), getattr(function, "pool", "rule"))


def _construct(factory: type[Any], args: Mapping[str, Any]) -> Any:
    check_args(factory, args)
    try:
        reward = factory(**args)
    except ValidationError as error:
        messages = [f"{argument}: {message}" for argument, message in problems(error, args)]
        raise ValueError(f"args: {'; '.join(messages)}") from error
    except Exception as error:
        message = describe_error(error, Path(str(getsourcefile(factory))))
        raise ValueError(f"{describe(factory)}: {message}") from error
    if not (hasattr(reward, "score") or hasattr(reward, "score_batch")):
        raise ValueError(f"{describe(factory)} has neither score(task, completion) nor score_batch(tasks, completions)")
    for method, parameters in _METHODS.items():
        if hasattr(reward, method):
            check_call(getattr(reward, method), f"{method}({', '.join(parameters)})", *parameters)
    return reward
