"""Our rewards by name.

A factory is written as where to find it, not as the thing itself: the checkers' libraries take 0.4 s (math-verify) to
1.6 s (reasoning_gym) to import, and only the judging process that uses one should wait for it.
"""

from pkgutil import resolve_name

from pydantic import ValidationError

from configs.base import neighbour, problems
from configs.rewards import RewardSpec
from rewards.types import Reward

FACTORIES: dict[str, str] = {
    "math": "rewards.math:MathReward",
    "reasoning_gym": "rewards.gym:GymReward",
}


def build(spec: RewardSpec) -> Reward:
    """The reward that `spec` names, made with its arguments.

    Raises ValueError for a name that is not known, with the nearest that is, and for an argument that the reward does
    not take or that has a wrong value, with the reward, the argument and the value.
    """
    if spec.name not in FACTORIES:
        raise ValueError(f"unknown reward '{spec.name}': {neighbour(spec.name, list(FACTORIES))}")
    factory = resolve_name(FACTORIES[spec.name])
    try:
        return factory(**spec.args)
    except ValidationError as error:
        said = "; ".join(f"{argument}: {message}" for argument, message in problems(error, spec.args))
        raise ValueError(f"reward '{spec.name}', args: {said}") from error
