"""Preview a run before anything starts: each stage's action, model, layout and data, and all reasons to refuse it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.base import walk
from configs.data import SOURCE_TYPES
from configs.graph import chosen, graph, missing
from configs.model import FirstModelConfig
from configs.references import PREFIX
from configs.sampling import RolloutConfig
from configs.stages import AnyStage, Recipe
from configs.train import TrainerConfig
from pipeline.cluster.demand import stage_demand
from pipeline.run.stage import StageProgress, check_stage, progress
from pipeline.weights.architecture import architecture_file

UNKNOWN_SIZE = "size unknown here: not fetched"


@dataclass(frozen=True, slots=True)
class StageSelection:
    """The options of `run` that select stages (see configs.graph.chosen)."""

    start: str | None = None
    until: str | None = None
    only: str | None = None


@dataclass(slots=True)
class StagePreview:
    """One stage of a dry run.

    conflict: differences between the results in its folder and its present settings or inputs.
    missing_input: an input that does not exist here.
    """

    name: str
    config: AnyStage
    waits_for: list[str]
    selected: bool
    progress: StageProgress = "new"
    conflict: str = ""
    missing_input: str = ""

    @property
    def action(self) -> str:
        if self.conflict:
            return "refused"
        if self.progress == "done":
            return "reused"
        if not self.selected:
            return "left out"
        return {"new": "runs", "started": "resumed", "lengthened": "lengthened"}[self.progress]


def dry_run(recipe: Recipe, folder: Path, selection: StageSelection | None = None) -> list[StagePreview]:
    """Check the stages in order, each as far as it can be checked before its parents are done; `folder` is the run's.

    Raises ValueError for a selection that the recipe doesn't have, or that needs stages which are not done.

    Example:
        for stage in dry_run(recipe, Path("runs/demo"), StageSelection(until="reward")):
            print(stage.name, stage.action)
    """
    selection, stages = selection or StageSelection(), graph(recipe)
    names = chosen(stages, start=selection.start, until=selection.until, only=selection.only)
    previews: dict[str, StagePreview] = {}
    for name, config in recipe.stages.items():
        stage = previews[name] = StagePreview(name, config, stages[name], name in names)
        try:
            if all(previews[parent].progress == "done" for parent in stages[name]):
                stage.progress = progress(config, folder / name, recipe)
        except ValueError as error:
            stage.conflict = str(error)
            continue
        try:
            if stage.selected and stage.progress != "done":
                check_stage(config, recipe)
        except ValueError as error:
            stage.missing_input = str(error)
    undone = missing(stages, names, [name for name in previews if previews[name].progress == "done"])
    if undone:
        message = f"not done in '{folder}': {', '.join(undone)}, which {', '.join(names)} need; run these first"
        conflicts = [f"{name}: {previews[name].conflict}" for name in undone if previews[name].conflict]
        raise ValueError("\n".join([message, *conflicts]))
    return list(previews.values())


def refuse_problems(stages: list[StagePreview]) -> None:
    """Raise ValueError with every conflict and missing input of the selected stages."""
    reasons = [
        f"{stage.name}: {reason}"
        for stage in stages
        for reason in (stage.conflict, stage.missing_input)
        if stage.selected and reason
    ]
    if reasons:
        raise ValueError("\n".join(reasons))


def outdated(planned: list[StagePreview], recipe: Recipe) -> list[str]:
    """Name the selected stages that start from a selected training which now gets longer."""
    stages = graph(recipe)
    longer = [stage.name for stage in planned if stage.selected and stage.progress == "lengthened"]
    dependents = {name for start in longer for name in chosen(stages, start=start) if name != start}
    return [stage.name for stage in planned if stage.selected and stage.name in dependents]


def describe_model(config: AnyStage, recipe: Recipe) -> str:
    """Name a stage's model and its number of parameters, where no download is needed to count them."""
    model = config.candidate if config.type == "gate" else config.model
    if model is None:
        return ""
    if isinstance(model, FirstModelConfig) and model.init_config is not None:
        return f"{model.init_config}, {_size(architecture_file(model.init_config))}"
    path = str(model.path)
    if path.startswith(PREFIX):
        parent_model = describe_model(recipe.stages[path.removeprefix(PREFIX)], recipe)
        return f"{path}, {parent_model.rpartition(', ')[2]}"
    return f"{path}, {_size(Path(path).expanduser() / 'config.json')}"


def describe_layout(config: AnyStage, recipe: Recipe) -> list[str]:
    """List a stage's processes with their parallelism."""
    lines: list[str] = []
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    if trainer is not None:
        experts = f", EP {trainer.expert_parallel_size}" if trainer.expert_parallel_size > 1 else ""
        lines.append(f"{trainer.num_ranks} x rank, ZeRO-{trainer.zero_stage}{experts}")
    rollout: RolloutConfig | None = getattr(config, "rollout", None)
    if rollout is not None:
        lines.append(f"{rollout.num_engines} x engine, TP {rollout.tensor_parallel_size}")
    judges = [group for group in stage_demand(config, recipe).concurrent if group.kind == "judge"]
    return lines + [f"{group.count} x {group.noun}" for group in judges]


def describe_sources(config: AnyStage) -> list[str]:
    """List a stage's sources of data, each once."""
    sources = (_describe_source(node) for _, node in walk(config) if isinstance(node, SOURCE_TYPES))
    return list(dict.fromkeys(sources))


def _size(config_json: Path) -> str:
    if not config_json.is_file():
        return UNKNOWN_SIZE
    from pipeline.planner.architecture import (  # imports torch, which a run need not wait for
        format_parameters,
        meta_model,
    )

    try:
        model = meta_model(config_json)
    except ValueError as error:
        return f"size unknown: {error}"
    return format_parameters(sum(weights.numel() for weights in model.parameters()))


def _describe_source(source: Any) -> str:
    settings = source.model_dump(exclude_defaults=True)
    names = settings.get("paths") or [settings.get("path") or settings.get("task") or ""]
    rows = f"{settings['size']} rows" if "size" in settings else ""
    parts = (source.type, *map(str, names), rows, settings.get("split", ""))
    return " ".join(part for part in parts if part)
