"""Run one stage from its configuration to its figures: check it, reuse it if it is done, resume it if it was killed.

Each type of stage is a module of `pipeline.stages` with three functions: `run` is the algorithm, `launch(config,
folder, context)` starts the ranks, engines and judges and returns the figures, and `check(config)` raises ValueError
for bad input before anything starts. `launch` and `check` get the configuration with every `stage:NAME` resolved to a
folder, and `launch` with the precision of the checkpoint for `dtype: auto`.
"""

import json
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from configs.graph import validation_gate
from configs.references import resolve_references
from configs.stages import ON_POLICY, RESULT_FOLDERS, AnyStage, Recipe, sinks_of
from configs.train import TrainerConfig
from pipeline.cluster.machine import refuse_here
from pipeline.cluster.placement import StagePlacement
from pipeline.cluster.room import wait_for_resources
from pipeline.cluster.start import cluster_when_needed
from pipeline.cluster.storage import refuse_unshared
from pipeline.disk.files import write_atomic
from pipeline.disk.lock import locked
from pipeline.disk.recorded import FIGURES, begun, read_figures
from pipeline.errors import RankLost, RunStopped
from pipeline.reports.sinks import refuse_missing_sinks
from pipeline.reports.stage_page import write_html
from pipeline.run.lineage import (
    ValidationGate,
    check_lineage,
    input_paths,
    lengthening,
    record_length,
    write_lineage,
)
from pipeline.stages.context import Context
from pipeline.train.checkpoints import set_aside_damaged
from pipeline.weights.resolve import with_dtypes
from rewards.types import RewardsUnavailable
from rollout.actors import DataLost, EngineLost, RolloutError

_StageT = TypeVar("_StageT", bound=AnyStage)

MODULES = {
    "sft": "pipeline.stages.sft",
    "preferences": "pipeline.stages.preferences",
    "sample": "pipeline.stages.sample",
    "rm": "pipeline.stages.reward_model",
    "dpo": "pipeline.stages.dpo",
    "grpo": "pipeline.stages.grpo",
    "distill": "pipeline.stages.distill",
    "gate": "pipeline.stages.gate",
    "eval": "pipeline.stages.evaluate",
}
"""Module of each type of stage, imported when the stage runs."""


def check_stage(config: AnyStage, recipe: Recipe | None = None) -> None:
    """Raise ValueError for a source, reward or template that does not exist, and a package of `report_to` that isn't
    installed. References to other stages are not followed, since their results may not exist yet."""
    refuse_missing_sinks(sinks_of(config, recipe))
    _module(config).check(config)


def run_stage(config: AnyStage, folder: Path, recipe: Recipe | None = None) -> dict[str, float]:
    """Run one stage into `folder` on the cluster at RAY_ADDRESS, or a local one, and return its figures. A finished
    stage is reused, an unfinished one resumes.

    recipe: the recipe of the stage; `stage:NAME` is then a folder beside `folder`. Raises ValueError for bad input, too
    small a cluster, and a folder that holds another run or is in use; RunStopped where the stage stops itself,
    DecisionNeeded where a gate can't decide.

    Example:
        config = load_config("stage.yaml", ["steps=3"], SFTConfig).config
        figures = run_stage(config, Path("runs/sft"))
    """
    folder = folder.resolve()  # ranks have their own working directory
    resolved = resolve_stage(config, folder, recipe)
    check_stage(resolved, recipe)
    with locked(folder):
        return _run(config, resolved, folder, recipe)


StageProgress = Literal["new", "started", "lengthened", "done"]
"""`lengthened`: a training has steps, and gets more than it was begun with."""


def progress(config: AnyStage, folder: Path, recipe: Recipe) -> StageProgress:
    """Return the progress of a recipe's stage. Raises ValueError naming the differences if `folder` holds a run of
    other settings or inputs."""
    folder = folder.resolve()
    if not begun(folder):
        return "new"
    check_lineage(folder, config, resolve_stage(config, folder, recipe), resolve_gate(config, folder, recipe))
    if lengthening(folder, config):
        return "lengthened"
    return "started" if read_figures(folder) is None else "done"


def _run(config: AnyStage, resolved: AnyStage, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    gate = resolve_gate(config, folder, recipe)
    check_lineage(folder, config, resolved, gate)
    console = Console()
    if longer := lengthening(folder, config):
        record_length(folder, config)
        console.print(f"{folder.name}: {longer}; its steps are kept, and `hf` is replaced after the last", markup=False)
    if (earlier_figures := read_figures(folder)) is not None:
        console.print(f"[dim]{folder.name}: done before, reused ({folder})")
        return earlier_figures
    console.rule(f"[bold]{folder.name}[/] ({config.type})")

    def warn(text: str) -> None:
        console.print(text, style="yellow", markup=False, soft_wrap=True)

    if (folder / FIGURES).is_file():
        warn(f"'{folder / FIGURES}' is damaged: the stage resumes from its newest checkpoint and writes it again")
    resolved = with_dtypes(resolved)
    refuse_here(resolved, recipe)
    set_aside_damaged(folder, warn)
    write_lineage(folder, folder.name, config, resolved, gate)
    context = Context(
        (folder.parent if recipe else folder) / "evaluations", gate.resolved if gate else None, sinks_of(config, recipe)
    )

    def wait() -> StagePlacement | None:
        refuse_unshared(folder, input_paths(folder, resolved, gate))
        return wait_for_resources(resolved, recipe, warn)

    def launch() -> dict[str, float]:
        with cluster_when_needed(wait):
            return _module(config).launch(resolved, folder, context)

    try:
        figures = _with_restarts(launch, resolved, folder, warn)
    except (RolloutError, RewardsUnavailable) as error:
        raise RunStopped(str(error)) from error
    write_atomic(folder / FIGURES, json.dumps(figures, indent=1, sort_keys=True))
    write_html(folder)
    return figures


def _with_restarts(
    launch: Callable[[], dict[str, float]], config: AnyStage, folder: Path, warn: Callable[[str], None]
) -> dict[str, float]:
    """Launch a stage, and again where a rank, an engine or data of theirs was lost, as often as its trainer allows.

    Raises RunStopped where the nodes that are left can't run it.
    """
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    allowed, lost = trainer.max_restarts if trainer else 0, ""
    for number in count(1):
        try:
            return launch()
        except (RankLost, EngineLost, DataLost) as error:
            if number > allowed:
                raise
            lost = str(error)
            warn(f"{folder.name}: {lost}\nrestart {number} of {allowed} (trainer.max_restarts)")
            set_aside_damaged(folder, warn)
        except ValueError as refusal:
            if not lost:
                raise
            raise RunStopped(
                f"{folder.name}: {lost}\nthe nodes that are left can't run the stage: {refusal}; or bring the node "
                "back or add another, and the same command goes on"
            ) from refusal
    raise AssertionError


def resolve_stage(config: _StageT, folder: Path, recipe: Recipe | None) -> _StageT:
    """Replace references to other stages by their result folders, beside `folder`. Raises ValueError for a result that
    does not exist yet, and for a reference without a recipe."""

    def result_folder(name: str) -> Path:
        if recipe is None:
            raise ValueError(
                f"'stage:{name}' names a stage of a recipe, but this stage runs alone; give the folder of its result"
            )
        result = folder.parent / name / RESULT_FOLDERS[recipe.stages[name].type]
        if not result.is_dir():
            raise ValueError(f"'stage:{name}': '{result}' does not exist; run stage '{name}' first")
        return result

    return resolve_references(config, result_folder)


def resolve_gate(config: AnyStage, folder: Path, recipe: Recipe | None) -> ValidationGate | None:
    """Resolve the gate that validates the stage while it trains; None for none. The stage's own model replaces the
    gate's candidate and parent, which are not evaluated."""
    gate = validation_gate(config, recipe)
    if gate is None or not isinstance(config, ON_POLICY):
        return None
    gate = gate.model_copy(update={"candidate": config.model, "parent": config.model})
    return ValidationGate(gate, resolve_stage(gate, folder, recipe))


def _module(config: AnyStage) -> Any:
    return import_module(MODULES[config.type])
