"""A recipe as a graph of stages: their parents, the stages selected to run, and those that may start now."""

from collections.abc import Collection, Mapping

from configs.base import neighbour
from configs.gate import GateConfig
from configs.load import load_config
from configs.references import references
from configs.stages import ON_POLICY, AnyStage, Recipe

Graph = Mapping[str, list[str]]
"""Parents of each stage by its name, in the recipe's order."""


def graph(recipe: Recipe) -> Graph:
    """Map each stage to its parents: those that it refers to, and those that the suites of its validation refer to."""
    parents = {
        name: {*references(stage).values(), *_validation_parents(stage, recipe)}
        for name, stage in recipe.stages.items()
    }
    return {name: [other for other in recipe.stages if other in parents[name]] for name in recipe.stages}


def _validation_parents(stage: AnyStage, recipe: Recipe) -> set[str]:
    gate = validation_gate(stage, recipe)
    return {parent for key, parent in references(gate).items() if key.startswith("suites.")} if gate else set()


def validation_gate(stage: AnyStage, recipe: Recipe | None) -> GateConfig | None:
    """Return the gate, of the recipe or in a file, whose suites evaluate `stage` while it trains; None for none.

    Raises ValueError for a file that does not exist or holds no gate.
    """
    if not isinstance(stage, ON_POLICY) or stage.validation is None:
        return None
    gate = recipe.stages.get(stage.validation.gate) if recipe else None
    return gate if isinstance(gate, GateConfig) else load_config(stage.validation.gate, [], GateConfig).config


def ancestors(stages: Graph, name: str) -> set[str]:
    """Return all stages that must be done before `name`."""
    return set(stages[name]).union(*(ancestors(stages, parent) for parent in stages[name]))


def chosen(stages: Graph, *, start: str | None = None, until: str | None = None, only: str | None = None) -> list[str]:
    """Select the stages to run, in the recipe's order: all; from `start` on with its descendants; up to `until` with
    its ancestors; or `only` one.

    Raises ValueError for an unknown name, and for options that select nothing.
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


def missing(stages: Graph, names: Collection[str], done_names: Collection[str]) -> list[str]:
    """List the ancestors of `names` that are neither among them nor done, in the recipe's order."""
    needed = set[str]().union(*(ancestors(stages, name) for name in names))
    return [name for name in stages if name in needed and name not in names and name not in done_names]


def ready(stages: Graph, waiting_names: Collection[str], done_names: Collection[str]) -> list[str]:
    """List the waiting stages whose parents are done."""
    return [name for name in stages if name in waiting_names and set(stages[name]) <= set(done_names)]


def cut_off(stages: Graph, waiting_names: Collection[str], ended_names: Collection[str]) -> dict[str, str]:
    """Map each waiting stage that can't start any more to its first ancestor that ended without a result."""
    causes: dict[str, str] = {}
    for name in stages:
        ended_ancestors = [other for other in stages if other in ended_names and other in ancestors(stages, name)]
        if name in waiting_names and ended_ancestors:
            causes[name] = ended_ancestors[0]
    return causes
