"""A recipe as a graph: which stage waits for which, which of them are to run, and which may start now."""

from collections.abc import Collection, Mapping

from configs.base import neighbour
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.load import load_config
from configs.references import references
from configs.stages import AnyStage, Recipe

Graph = Mapping[str, list[str]]
"""By the name of each stage those that it waits for, in the recipe's order."""


def graph(recipe: Recipe) -> Graph:
    """What each stage refers to, by itself or in the suites it validates on: it can't start before these are done."""
    made_of = {name: {*references(stage).values(), *_judging(stage, recipe)} for name, stage in recipe.stages.items()}
    return {name: [other for other in recipe.stages if other in needed] for name, needed in made_of.items()}


def _judging(stage: AnyStage, recipe: Recipe) -> set[str]:
    """What the suites refer to that `stage` is evaluated on while it trains: those of a gate that comes after it."""
    gate = validation_gate(stage, recipe)
    return {parent for key, parent in references(gate).items() if key.startswith("suites.")} if gate else set()


def validation_gate(stage: AnyStage, recipe: Recipe | None) -> GateConfig | None:
    """The gate that `stage` names to be evaluated by while it trains, in the recipe or as a file; None where it names
    none. Raises ValueError for a file that isn't there or holds no gate."""
    if not isinstance(stage, GRPOConfig) or stage.validation is None:
        return None
    named = recipe.stages.get(stage.validation.gate) if recipe else None
    return named if isinstance(named, GateConfig) else load_config(stage.validation.gate, [], GateConfig).config


def ancestors(stages: Graph, name: str) -> set[str]:
    """Every stage that must be done before `name`."""
    return set(stages[name]).union(*(ancestors(stages, parent) for parent in stages[name]))


def chosen(stages: Graph, *, start: str | None = None, until: str | None = None, only: str | None = None) -> list[str]:
    """The stages to run, in the recipe's order: all of them; with `start` that one and what follows from it; with
    `until` that one and what it needs; with `only` that one.

    Raises ValueError for an unknown name, and for a choice that leaves nothing.
    """
    for option, name in (("--from", start), ("--until", until), ("--only", only)):
        if name is not None and name not in stages:
            raise ValueError(f"{option} {name}: the recipe has no such stage; {neighbour(name, list(stages))}")
    if only is not None:
        if start is not None or until is not None:
            raise ValueError("--only takes one stage alone; leave out --from and --until")
        return [only]
    names = [
        name
        for name in stages
        if (start is None or name == start or start in ancestors(stages, name))
        and (until is None or name == until or name in ancestors(stages, until))
    ]
    if not names:
        raise ValueError(f"--from {start} --until {until}: '{until}' does not need '{start}', so nothing would run")
    return names


def missing(stages: Graph, names: Collection[str], done: Collection[str]) -> list[str]:
    """Stages that `names` need, that are not among them and not done, in the recipe's order."""
    needed = set[str]().union(*(ancestors(stages, name) for name in names))
    return [name for name in stages if name in needed and name not in names and name not in done]


def ready(stages: Graph, waiting: Collection[str], done: Collection[str]) -> list[str]:
    """Those of the waiting stages whose inputs are there."""
    return [name for name in stages if name in waiting and set(stages[name]) <= set(done)]


def cut_off(stages: Graph, waiting: Collection[str], ended: Collection[str]) -> dict[str, str]:
    """Of the waiting stages those that will never start, each with the first of the `ended` (without a result) that it
    needs."""
    found: dict[str, str] = {}
    for name in stages:
        lost = [other for other in stages if other in ended and other in ancestors(stages, name)]
        if name in waiting and lost:
            found[name] = lost[0]
    return found
