"""Run one stage from its configuration to its figures: check it, reuse it where it is done, resume it where it was
killed.

Each type of stage is a module of `pipeline.stages` with three functions: `run` is its algorithm, `launch(config,
folder, context)` starts the ranks, engines and judges that it needs and returns the figures, and `check(config)` raises
ValueError for bad input before anything starts. Both get the configuration with its references resolved.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from configs.gate import GateConfig
from configs.graph import validation_gate
from configs.grpo import GRPOConfig
from configs.references import resolved
from configs.stages import RESULTS, AnyStage, Recipe
from pipeline.cluster.machine import refuse_here
from pipeline.cluster.room import await_room
from pipeline.cluster.start import cluster_when_needed
from pipeline.disk.files import write_atomic
from pipeline.disk.lock import locked
from pipeline.disk.recorded import FIGURES, begun, read_figures
from pipeline.errors import RunStopped
from pipeline.reports.stage_page import write_html
from pipeline.run.lineage import Validating, check_lineage, write_lineage
from pipeline.stages.context import Context
from pipeline.train.checkpoints import set_aside_damaged
from rewards.types import RewardsUnavailable
from rollout.pool import RolloutError

MODULES = {
    "sft": "pipeline.stages.sft",
    "preferences": "pipeline.stages.preferences",
    "sample": "pipeline.stages.sample",
    "rm": "pipeline.stages.reward_model",
    "grpo": "pipeline.stages.grpo",
    "gate": "pipeline.stages.gate",
    "eval": "pipeline.stages.evaluate",
}
"""Module of each type of stage; only the one that runs is imported."""


def check_stage(config: AnyStage) -> None:
    """Raise ValueError for a source, reward or template that isn't there, before anything starts. References to other
    stages, whose results may not be there yet, are not followed."""
    _module(config).check(config)


def run_stage(config: AnyStage, folder: Path, recipe: Recipe | None = None) -> dict[str, float]:
    """Run one stage into `folder` on the cluster that RAY_ADDRESS names, or a local one, and return its figures. A
    finished stage is not run again, an unfinished one continues.

    recipe: what the stage is part of; `stage:NAME` is then a folder beside `folder`. Raises ValueError for bad input,
    for what the cluster can't give, and where `folder` holds another one's run or somebody else is writing it;
    RunStopped where the stage stopped itself, DecisionNeeded where a gate asks.
    """
    folder = folder.resolve()  # ranks have a working directory of their own
    runnable = resolve(config, folder, recipe)
    check_stage(runnable)
    with locked(folder):
        return _run(config, runnable, folder, recipe)


def standing(config: AnyStage, folder: Path, recipe: Recipe) -> Literal["new", "started", "done"]:
    """How far the stage of a recipe is. Raises ValueError naming the differences where `folder` holds another one's
    run."""
    folder = folder.resolve()
    if not begun(folder):
        return "new"
    check_lineage(folder, config, resolve(config, folder, recipe), validating(config, folder, recipe))
    return "started" if read_figures(folder) is None else "done"


def _run(config: AnyStage, runnable: AnyStage, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    by = validating(config, folder, recipe)
    check_lineage(folder, config, runnable, by)
    console = Console()
    before = read_figures(folder)
    if before is not None:
        console.print(f"[dim]{folder.name}: done before, reused ({folder})")
        return before
    console.rule(f"[bold]{folder.name}[/] ({config.type})")

    def tell(text: str) -> None:
        console.print(text, style="yellow", markup=False, soft_wrap=True)

    if (folder / FIGURES).is_file():
        tell(f"'{folder / FIGURES}' is damaged: the stage goes on from what it has kept, and writes it again")
    refuse_here(runnable, recipe)
    set_aside_damaged(folder, tell)
    write_lineage(folder, folder.name, config, runnable, by)
    context = Context((folder.parent if recipe else folder) / "evaluations", by.runnable if by else None)
    try:
        with cluster_when_needed(lambda: await_room(runnable, recipe, tell)):
            figures: dict[str, float] = _module(config).launch(runnable, folder, context)
    except (RolloutError, RewardsUnavailable) as error:
        raise RunStopped(f"{folder.name} stopped itself: {error}") from error
    write_atomic(folder / FIGURES, json.dumps(figures, indent=1, sort_keys=True))
    write_html(folder)
    return figures


def resolve(config: AnyStage, folder: Path, recipe: Recipe | None) -> AnyStage:
    """`config` with what its references name, below the run that `folder` is a stage of. Raises ValueError where that
    isn't there, or there is no recipe."""

    def folder_of(name: str) -> Path:
        if recipe is None:
            raise ValueError(
                f"'stage:{name}' names a stage of a recipe, but this stage runs alone; give the folder of what it made"
            )
        made = folder.parent / name / RESULTS[recipe.stages[name].type]
        if not made.is_dir():
            raise ValueError(f"'stage:{name}': '{made}' is not there; run stage '{name}' first")
        return made

    return resolved(config, folder_of)


def validating(config: AnyStage, folder: Path, recipe: Recipe | None) -> Validating | None:
    """The gate whose suites the stage is evaluated on while it trains; None where there is none. Its candidate and
    parent, which play no part here, are the stage's model. Raises ValueError as `validation_gate` and `resolve` do."""
    gate = validation_gate(config, recipe)
    if gate is None or not isinstance(config, GRPOConfig):
        return None
    given = gate.model_copy(update={"candidate": config.model, "parent": config.model})
    runnable = resolve(given, folder, recipe)
    assert isinstance(runnable, GateConfig), "what is resolved keeps its type"
    return Validating(given, runnable)


def _module(config: AnyStage) -> Any:
    return import_module(MODULES[config.type])
