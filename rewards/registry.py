"""From a spec to the reward that judges.

Everything that can be known to be wrong is said here: before a run loads any model, every spec is built once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import getsourcefile, isclass, signature
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from configs.base import problems
from configs.rewards import RewardSpec
from rewards.adapters import WRITTEN_FOR, adapt
from rewards.plugins import check_args, check_call, describe, fault, load, locate
from rewards.types import Reward

_METHODS = {
    "score": ("task", "completion"),
    "score_batch": ("tasks", "completions"),
    "setup": (),
    "check": ("task",),
    "time_limit": ("task",),
}
"""What a reward may have, and what each is called with."""


@dataclass(frozen=True, slots=True)
class FunctionReward:
    """A plain function as a reward. It says by an attribute, `function.pool = "model"`, that it is no rule."""

    score: Callable[..., Any]
    pool: str


def build(spec: RewardSpec) -> Reward:
    """The reward that `spec` names, made with its arguments.

    A function `f(task, completion, **args)` judges as it stands, a class is constructed with the arguments, and what
    was written for another library is adapted to us.

    Raises ValueError, with the reward's name and the file and line of what is wrong: a name that leads nowhere, a
    module that can't be imported, a signature that doesn't fit, and an argument that it does not take or that has a
    wrong value.
    """
    place = locate(spec.name)
    try:
        reward = _build(place.library, load(place), spec.args)
    except ValueError as error:
        raise ValueError(f"reward '{spec.name}': {error}") from error
    return cast(Reward, reward)


def _build(library: str, thing: Any, args: Mapping[str, Any]) -> Any:
    if library:
        return adapt(library, thing, args)
    if isclass(thing):
        return _construct(thing, args)
    if not callable(thing):
        raise ValueError(f"is of type {type(thing).__name__}: neither a function nor a class")
    parameters = list(signature(thing).parameters)
    for parameter, foreign in WRITTEN_FOR.items():
        if parameter in parameters:
            raise ValueError(f"{describe(thing)} is written for {foreign}: put '{foreign}:' before its name")
    check_args(thing, args, given=parameters[:2])
    written = ", ".join(["task, completion", *(f"{key}=..." for key in args)])
    check_call(thing, f"{getattr(thing, '__name__', 'score')}({written})", "task", "completion", **args)
    return FunctionReward(partial(thing, **args), getattr(thing, "pool", "rule"))


def _construct(factory: type[Any], args: Mapping[str, Any]) -> Any:
    check_args(factory, args)
    try:
        reward = factory(**args)
    except ValidationError as error:
        said = "; ".join(f"{argument}: {message}" for argument, message in problems(error, args))
        raise ValueError(f"args: {said}") from error
    except Exception as error:
        raise ValueError(f"{describe(factory)}: {fault(error, Path(str(getsourcefile(factory))))}") from error
    if not (hasattr(reward, "score") or hasattr(reward, "score_batch")):
        raise ValueError(f"{describe(factory)} has neither score(task, completion) nor score_batch(tasks, completions)")
    for method, parameters in _METHODS.items():
        if hasattr(reward, method):
            check_call(getattr(reward, method), f"{method}({', '.join(parameters)})", *parameters)
    return reward
