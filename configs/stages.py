"""The stages by type, and a recipe of them."""

from typing import Annotated

from pydantic import Field, model_validator

from configs.base import Settings
from configs.evaluation import EvalConfig
from configs.gate import GateConfig
from configs.grpo import GRPOConfig
from configs.preferences import PreferencesConfig
from configs.references import references
from configs.reward_model import RewardModelConfig
from configs.sample import SampleConfig
from configs.sft import SFTConfig

AnyStage = SFTConfig | PreferencesConfig | SampleConfig | RewardModelConfig | GRPOConfig | EvalConfig | GateConfig
StageConfig = Annotated[AnyStage, Field(discriminator="type")]
STAGES: dict[str, type[AnyStage]] = {
    "sft": SFTConfig,
    "preferences": PreferencesConfig,
    "sample": SampleConfig,
    "rm": RewardModelConfig,
    "grpo": GRPOConfig,
    "eval": EvalConfig,
    "gate": GateConfig,
}

RESULTS = {"sft": "hf", "grpo": "hf", "gate": "hf", "rm": "hf", "preferences": "data", "sample": "data"}
"""Folder of what a stage of each type makes, in its own; `stage:NAME` stands for it. An evaluation makes none."""

LANGUAGE_MODELS = ("sft", "grpo", "gate")


class Recipe(Settings):
    """Stages, each after those that it refers to; `stage:NAME` hands one's result to another."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the run: its folder below `runs_dir`."""
    runs_dir: str = "runs"
    """Folder the run's folder is made in."""
    seed: int | None = None
    """A number that stages may refer to as `${seed}`, so that one override reseeds the whole recipe."""
    stages: dict[str, StageConfig] = Field(min_length=1)
    """The stages by name. A stage stands after those that it refers to; those that don't need each other may run side
    by side."""

    @model_validator(mode="after")
    def _known_parents(self) -> "Recipe":
        seen: dict[str, str] = {}
        for name, stage in self.stages.items():
            for key, parent in references(stage).items():
                where = f"stages.{name}.{key}='stage:{parent}'"
                if parent not in seen:
                    raise ValueError(f"{where}: no earlier stage '{parent}'; earlier stages: {list(seen)}")
                fitting = _fitting(key, stage.type)
                if seen[parent] not in fitting:
                    raise ValueError(f"{where}: a stage of type '{seen[parent]}', but {' or '.join(fitting)} fits here")
            seen[name] = stage.type
        return self

    @model_validator(mode="after")
    def _known_gates(self) -> "Recipe":
        for name, stage in self.stages.items():
            gate = stage.validation.gate if isinstance(stage, GRPOConfig) and stage.validation else None
            if gate in self.stages and self.stages[gate].type != "gate":
                raise ValueError(f"stages.{name}.validation.gate='{gate}' is a stage of type {self.stages[gate].type}")
        return self


def _fitting(key: str, stage_type: str) -> tuple[str, ...]:
    """Types of the stages whose result may stand at `key` of a stage of `stage_type`."""
    parts = key.split(".")
    if "source" in parts:
        return ("preferences", "sample")
    if "args" in parts:
        return ("rm", *LANGUAGE_MODELS)
    return (*LANGUAGE_MODELS, "rm") if stage_type == "rm" else LANGUAGE_MODELS
