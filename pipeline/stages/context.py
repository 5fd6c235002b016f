"""Inputs of a stage besides its own configuration and folder."""

from dataclasses import dataclass
from pathlib import Path

from configs.gate import GateConfig


@dataclass(frozen=True, slots=True)
class Context:
    """Built by `pipeline.run.stage`, with references resolved to folders.

    evaluations: folder of evaluations by the hash of checkpoint and suites, shared by the gates of a run so that no
        checkpoint is evaluated twice.
    validation_gate: the gate whose suites evaluate a GRPO stage while it trains.
    """

    evaluations: Path
    validation_gate: GateConfig | None = None
