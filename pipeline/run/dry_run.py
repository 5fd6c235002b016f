"""What running a recipe would do, told before anything starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from configs.base import walk
from configs.data import Source
from configs.graph import chosen, graph, missing
from configs.model import FirstModelConfig
from configs.references import PREFIX
from configs.sampling import RolloutConfig
from configs.stages import AnyStage, Recipe
from configs.train import TrainerConfig
from pipeline.cluster.demand import demand
from pipeline.run.stage import check_stage, standing
from pipeline.weights.architecture import architecture_file

UNKNOWN_SIZE = "size unknown here: not fetched"
SOURCES = get_args(get_args(Source)[0])


@dataclass(frozen=True, slots=True)
class Choice:
    """Which stages of a recipe are to run, as `run` takes it (see configs.graph.chosen)."""

    start: str | None = None
    until: str | None = None
    only: str | None = None


@dataclass(slots=True)
class Planned:
    """A stage in the plan."""

    name: str
    config: AnyStage
    waits_for: list[str]
    chosen: bool
    standing: Literal["new", "started", "done"] = "new"
    differs: str = ""
    """How what its folder holds differs from what it would be now."""
    lacks: str = ""
    """What it needs and is not to be found from here."""

    @property
    def action(self) -> str:
        """What would be done with it."""
        if self.differs:
            return "refused"
        if self.standing == "done":
            return "reused"
        if not self.chosen:
            return "left out"
        return "resumed" if self.standing == "started" else "runs"


def plan(recipe: Recipe, folder: Path, choice: Choice | None = None) -> list[Planned]:
    """The stages in order, each looked at as far as it can be before its inputs are there; `folder` is the run's.

    Raises ValueError for a choice that the recipe doesn't have, or that needs stages which are not done.
    """
    choice, stages = choice or Choice(), graph(recipe)
    names = chosen(stages, start=choice.start, until=choice.until, only=choice.only)
    planned: dict[str, Planned] = {}
    for name, config in recipe.stages.items():
        stage = planned[name] = Planned(name, config, stages[name], name in names)
        try:
            if all(planned[parent].standing == "done" for parent in stages[name]):
                stage.standing = standing(config, folder / name, recipe)
        except ValueError as error:
            stage.differs = str(error)
            continue
        try:
            if stage.chosen and stage.standing != "done":
                check_stage(config)
        except ValueError as error:
            stage.lacks = str(error)
    undone = missing(stages, names, [name for name in planned if planned[name].standing == "done"])
    if undone:
        said = f"not done in '{folder}': {', '.join(undone)}, which {', '.join(names)} need; run these first"
        differs = [f"{name}: {planned[name].differs}" for name in undone if planned[name].differs]
        raise ValueError("\n".join([said, *differs]))
    return list(planned.values())


def refuse(stages: list[Planned]) -> None:
    """Raises ValueError with everything that stands against the plan."""
    against = [
        f"{stage.name}: {why}" for stage in stages for why in (stage.differs, stage.lacks) if stage.chosen and why
    ]
    if against:
        raise ValueError("\n".join(against))


def told_model(config: AnyStage, recipe: Recipe) -> str:
    """The model a stage starts from and its parameters in all, where they are known without fetching anything."""
    model = config.candidate if config.type == "gate" else config.model
    if model is None:
        return ""
    if isinstance(model, FirstModelConfig) and model.init_config is not None:
        return f"{model.init_config}, {_size(architecture_file(model.init_config))}"
    path = str(model.path)
    if path.startswith(PREFIX):
        of_parent = told_model(recipe.stages[path.removeprefix(PREFIX)], recipe)
        return f"{path}, {of_parent.rpartition(', ')[2]}"
    return f"{path}, {_size(Path(path).expanduser() / 'config.json')}"


def told_layout(config: AnyStage, recipe: Recipe) -> list[str]:
    """How a stage is spread over processes."""
    lines: list[str] = []
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    if trainer is not None:
        experts = f", EP {trainer.expert_parallel_size}" if trainer.expert_parallel_size > 1 else ""
        lines.append(f"{trainer.num_ranks} x rank, ZeRO-{trainer.zero_stage}{experts}")
    rollout: RolloutConfig | None = getattr(config, "rollout", None)
    if rollout is not None:
        lines.append(f"{rollout.num_engines} x engine, TP {rollout.tensor_parallel_size}")
    judges = [some for some in demand(config, recipe).actors if not some.shares]
    return lines + [f"{some.count} x {some.noun}" for some in judges]


def told_sources(config: AnyStage) -> list[str]:
    """Where a stage's rows come from."""
    return list(dict.fromkeys(_told_source(source) for _, source in walk(config) if isinstance(source, SOURCES)))


def _size(config_json: Path) -> str:
    if not config_json.is_file():
        return UNKNOWN_SIZE
    from pipeline.planner.architecture import meta_model, told_parameters  # with torch, which no run waits for

    try:
        model = meta_model(config_json)
    except ValueError as error:
        return f"size unknown: {error}"
    return told_parameters(sum(weights.numel() for weights in model.parameters()))


def _told_source(source: Any) -> str:
    kind, settings = source.type, source.model_dump(exclude_defaults=True)
    named = settings.get("paths") or [settings.get("path") or settings.get("task") or ""]
    rows = f"{settings['size']} rows" if "size" in settings else ""
    split = settings.get("split", "")
    return " ".join(part for part in (kind, *map(str, named), rows, split) if part)
