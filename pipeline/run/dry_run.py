"""The dry run of a recipe: each stage's action, model, layout, data and problems, before anything starts."""

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
_SOURCES = get_args(get_args(Source)[0])


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of `alignyard run` that select stages (see configs.graph.chosen)."""

    start: str | None = None
    until: str | None = None
    only: str | None = None


@dataclass(slots=True)
class DryRunStage:
    """A stage in a dry run."""

    name: str
    config: AnyStage
    waits_for: list[str]
    chosen: bool
    standing: Literal["new", "started", "done"] = "new"
    differs: str = ""
    """Difference between the run in its folder and its present configuration."""
    lacks: str = ""
    """Inputs that this machine does not find."""

    @property
    def action(self) -> str:
        """The action that `alignyard run` would take, in a word."""
        if self.differs:
            return "refused"
        if self.standing == "done":
            return "reused"
        if not self.chosen:
            return "left out"
        return "resumed" if self.standing == "started" else "runs"


def dry_run(recipe: Recipe, folder: Path, choice: Choice | None = None) -> list[DryRunStage]:
    """Check every stage, in order, as far as its inputs exist; `folder` is the run's.

    Raises ValueError for a stage that the recipe doesn't have, and for a choice that needs stages which are not done.
    """
    choice, stages = choice or Choice(), graph(recipe)
    names = chosen(stages, start=choice.start, until=choice.until, only=choice.only)
    checked: dict[str, DryRunStage] = {}
    for name, config in recipe.stages.items():
        stage = checked[name] = DryRunStage(name, config, stages[name], name in names)
        try:
            if all(checked[parent].standing == "done" for parent in stages[name]):
                stage.standing = standing(config, folder / name, recipe)
        except ValueError as error:
            stage.differs = str(error)
            continue
        try:
            if stage.chosen and stage.standing != "done":
                check_stage(config)
        except ValueError as error:
            stage.lacks = str(error)
    undone = missing(stages, names, [name for name in checked if checked[name].standing == "done"])
    if undone:
        message = f"not done in '{folder}': {', '.join(undone)}, which {', '.join(names)} need; run these first"
        differs = [f"{name}: {checked[name].differs}" for name in undone if checked[name].differs]
        raise ValueError("\n".join([message, *differs]))
    return list(checked.values())


def refuse_problems(stages: list[DryRunStage]) -> None:
    """Raise ValueError with every problem of the chosen stages."""
    problems = [
        f"{stage.name}: {problem}"
        for stage in stages
        for problem in (stage.differs, stage.lacks)
        if stage.chosen and problem
    ]
    if problems:
        raise ValueError("\n".join(problems))


def describe_model(config: AnyStage, recipe: Recipe) -> str:
    """Describe the model that a stage starts from, with its number of parameters where nothing has to be fetched."""
    model = config.candidate if config.type == "gate" else config.model
    if model is None:
        return ""
    if isinstance(model, FirstModelConfig) and model.init_config is not None:
        return f"{model.init_config}, {_size(architecture_file(model.init_config))}"
    path = str(model.path)
    if path.startswith(PREFIX):
        parent = describe_model(recipe.stages[path.removeprefix(PREFIX)], recipe)
        return f"{path}, {parent.rpartition(', ')[2]}"
    return f"{path}, {_size(Path(path).expanduser() / 'config.json')}"


def describe_layout(config: AnyStage, recipe: Recipe) -> list[str]:
    """Describe a stage's ranks, engines and judges, a line each."""
    lines: list[str] = []
    trainer: TrainerConfig | None = getattr(config, "trainer", None)
    if trainer is not None:
        experts = f", EP {trainer.expert_parallel_size}" if trainer.expert_parallel_size > 1 else ""
        lines.append(f"{trainer.num_ranks} x rank, ZeRO-{trainer.zero_stage}{experts}")
    rollout: RolloutConfig | None = getattr(config, "rollout", None)
    if rollout is not None:
        lines.append(f"{rollout.num_engines} x engine, TP {rollout.tensor_parallel_size}")
    judges = [actors for actors in demand(config, recipe).actors if not actors.shares]
    return lines + [f"{actors.count} x {actors.noun}" for actors in judges]


def describe_sources(config: AnyStage) -> list[str]:
    """Describe each source of a stage's rows once."""
    sources = (source for _, source in walk(config) if isinstance(source, _SOURCES))
    return list(dict.fromkeys(map(_describe_source, sources)))


def _size(config_json: Path) -> str:
    if not config_json.is_file():
        return UNKNOWN_SIZE
    from pipeline.planner.architecture import format_parameters, meta_model  # imports torch, so only here

    try:
        model = meta_model(config_json)
    except ValueError as error:
        return f"size unknown: {error}"
    return format_parameters(sum(weights.numel() for weights in model.parameters()))


def _describe_source(source: Any) -> str:
    kind, settings = source.type, source.model_dump(exclude_defaults=True)
    named = settings.get("paths") or [settings.get("path") or settings.get("task") or ""]
    rows = f"{settings['size']} rows" if "size" in settings else ""
    split = settings.get("split", "")
    return " ".join(part for part in (kind, *map(str, named), rows, split) if part)
