"""Stages by type, and a recipe of stages."""

from typing import Annotated

from pydantic import Field, model_validator

from configs.base import Settings, neighbour, walk
from configs.distill import DistillConfig
from configs.dpo import DPOConfig
from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.preferences import PreferencesConfig
from configs.references import PREFIX, references
from configs.reward_model import RewardModelConfig
from configs.rewards import RewardSpec
from configs.sample import SampleConfig
from configs.sft import SFTConfig
from configs.sinks import SinkName, SinkNames

AnyStage = (
    SFTConfig
    | PreferencesConfig
    | SampleConfig
    | RewardModelConfig
    | DPOConfig
    | GRPOConfig
    | DistillConfig
    | EvalConfig
    | GateConfig
)
StageConfig = Annotated[AnyStage, Field(discriminator="type")]
STAGES: dict[str, type[AnyStage]] = {
    "sft": SFTConfig,
    "preferences": PreferencesConfig,
    "sample": SampleConfig,
    "rm": RewardModelConfig,
    "dpo": DPOConfig,
    "grpo": GRPOConfig,
    "distill": DistillConfig,
    "eval": EvalConfig,
    "gate": GateConfig,
}

RESULT_FOLDERS = {
    "sft": "hf",
    "dpo": "hf",
    "grpo": "hf",
    "distill": "hf",
    "gate": "hf",
    "rm": "hf",
    "preferences": "data",
    "sample": "data",
}
"""Folder of a stage's result within its own, by type; `stage:NAME` stands for it. An evaluation has none."""

ON_POLICY = (GRPOConfig, DistillConfig)
"""Stages that train a policy on its own samples, with engines beside the ranks."""

LANGUAGE_MODELS = ("sft", "dpo", "grpo", "distill", "gate")

StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
"""A stage's name is also the name of its folder in the run, and a part of its job's."""


class Recipe(Settings):
    """Stages in order. `stage:NAME` stands for the result of an earlier stage."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """Name of the run, and of its folder below `runs_dir`."""
    runs_dir: str = "runs"
    """Folder that holds the run's folder."""
    seed: int | None = None
    """A seed that stages may refer to as `${seed}`, so that one override reseeds the whole recipe."""
    report_to: SinkNames = Field(default_factory=list[SinkName])
    """Services that get the figures and samples of every training stage, beside TensorBoard's files."""
    copy_to: str | None = None
    """Address that results are copied to, below the run's name: each stage when it is done, and the run's own files at
    its end (docs/storage.md)."""
    stages: dict[StageName, StageConfig] = Field(min_length=1)
    """Stages by name, each after those that it refers to. Independent stages may run in parallel."""

    @model_validator(mode="after")
    def _known_parents(self) -> "Recipe":
        if "evaluations" in self.stages:
            raise ValueError("stages.evaluations: the run keeps a folder of that name; rename the stage")
        types: dict[str, str] = {}
        for name, stage in self.stages.items():
            for key, parent in references(stage).items():
                where = f"stages.{name}.{key}='stage:{parent}'"
                if parent not in types:
                    raise ValueError(f"{where}: no earlier stage '{parent}'; earlier stages: {list(types)}")
                fitting = _fitting_types(key, stage.type)
                if types[parent] not in fitting:
                    raise ValueError(
                        f"{where}: a stage of type '{types[parent]}', but {' or '.join(fitting)} fits here"
                    )
            types[name] = stage.type
        return self

    @model_validator(mode="after")
    def _served_as_trained(self) -> "Recipe":
        specs = [(name, key, node) for name, stage in self.stages.items() for key, node in walk(stage)]
        for name, key, spec in specs:
            path = spec.args.get("path") if isinstance(spec, RewardSpec) else None
            trained = self.stages.get(path.removeprefix(PREFIX)) if isinstance(path, str) else None
            if not isinstance(spec, RewardSpec) or not isinstance(trained, RewardModelConfig):
                continue
            reasoning = spec.args.get("reasoning", "keep")
            if reasoning != trained.data.reasoning:
                raise ValueError(
                    f"stages.{name}.{key}.args.reasoning={reasoning}, but '{path}' learns from "
                    f"data.reasoning={trained.data.reasoning}; set both alike"
                )
        return self

    @model_validator(mode="after")
    def _known_gates(self) -> "Recipe":
        names = list(self.stages)
        for index, (name, stage) in enumerate(self.stages.items()):
            gate = stage.validation.gate if isinstance(stage, ON_POLICY) and stage.validation else None
            if gate is None or gate.endswith((".yaml", ".yml")):
                continue
            where = f"stages.{name}.validation.gate='{gate}'"
            if gate not in self.stages:
                raise ValueError(f"{where}: no such stage; {neighbour(gate, names)} (a gate in a file ends in .yaml)")
            if self.stages[gate].type != "gate":
                raise ValueError(f"{where} is a stage of type {self.stages[gate].type}")
            for key, parent in references(self.stages[gate]).items():
                if key.startswith("suites.") and parent not in names[:index]:
                    raise ValueError(f"{where}: its {key}='stage:{parent}' is not made before '{name}' is")
        return self


def sinks_of(stage: AnyStage, recipe: Recipe | None) -> list[SinkName]:
    """Return the services that a stage reports to: its own, or else those of its recipe."""
    own: list[SinkName] | None = getattr(stage, "report_to", None)
    return own if own is not None else recipe.report_to if recipe and hasattr(stage, "report_to") else []


def _fitting_types(key: str, stage_type: str) -> tuple[str, ...]:
    """Return the types of the stages whose result fits at `key` of a stage of `stage_type`."""
    parts = key.split(".")
    if "source" in parts:
        return ("preferences", "sample")
    if "args" in parts:
        return ("rm", *LANGUAGE_MODELS)
    return (*LANGUAGE_MODELS, "rm") if stage_type == "rm" else LANGUAGE_MODELS
