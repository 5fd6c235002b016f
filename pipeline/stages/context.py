"""The parts of a run that a stage uses beside its own configuration and folder."""

from dataclasses import dataclass
from pathlib import Path

from configs.gate import GateConfig


@dataclass(frozen=True, slots=True)
class Context:
    """Every stage gets one from `pipeline.run.stage`, with the references in it resolved to folders."""

    evaluations: Path
    """Folder of evaluations, by the hash of checkpoint and suites. The gates of one run share it, so that a parent is
    not evaluated twice."""
    validation_gate: GateConfig | None = None
    """The gate whose suites evaluate a GRPO stage while it trains."""
