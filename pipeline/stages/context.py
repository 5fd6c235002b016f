"""Inputs of a stage besides its own configuration and folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.gate import GateConfig
from configs.sinks import SinkName


@dataclass(frozen=True, slots=True)
class Context:
    """Built by `pipeline.run.stage`, with references resolved to folders.

    evaluations: folder of evaluations by the hash of checkpoint and suites, shared by the gates of a run so that no
        checkpoint is evaluated twice.
    validation_gate: the gate whose suites evaluate a GRPO stage while it trains.
    report_to: services that get the stage's figures and samples.
    """

    evaluations: Path
    validation_gate: GateConfig | None = None
    report_to: Sequence[SinkName] = ()
