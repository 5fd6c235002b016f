"""Services that get the figures and samples of a stage."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

SinkName = Literal["wandb", "mlflow", "trackio", "swanlab"]
"""Weights & Biases, MLflow, trackio, SwanLab, each an extra of this package."""

SinkNames = Annotated[list[SinkName], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""A list of services; a single one may stand without brackets."""
