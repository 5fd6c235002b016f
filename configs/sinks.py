"""Services that get the figures and samples of a stage."""

from typing import Literal

SinkName = Literal["wandb", "mlflow", "trackio", "swanlab"]
"""Weights & Biases, MLflow, trackio, SwanLab, each an extra of this package."""
