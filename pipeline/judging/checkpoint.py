"""What judges that load a checkpoint have in common.

Torch, transformers and vLLM are imported where a model or a tokenizer is needed, not with this module: a reward is made
in every process that looks at a configuration, and sets its threads before torch counts them.
"""

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.references import PREFIX
from configs.rewards import PoolName
from configs.sampling import RolloutConfig
from rewards.types import Task
from rollout.process import compute_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CheckpointJudge(Settings):
    """A judge whose model lies in a folder and is loaded into the judging process by `setup`."""

    pool: ClassVar[PoolName] = "model"

    path: str
    """Folder of the checkpoint; `stage:NAME` takes the result of an earlier stage."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""
    max_length: int | None = Field(default=None, ge=16)
    """Longest input in tokens; what is longer is not judged (`abstain`), its prompt alone a bad row. None is the
    model's own `max_position_embeddings`."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker, kept apart from those of ranks and engines: a whole number, which vLLM splits the model over,
    or a fraction that judges share. None is one where the cluster has any; 0 computes on the CPU."""
    seconds: float = Field(default=30.0, gt=0)
    """Longest one verdict may take; those of a group, given in one call, have the sum."""
    start_seconds: float = Field(default=600.0, gt=0)
    """Longest a worker may take to load the model."""

    @model_validator(mode="after")
    def _sound(self) -> "CheckpointJudge":
        if self.promised:
            return self
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"path='{self.path}': no checkpoint there (no config.json; looked from {Path.cwd()})")
        positions = self.described.get("max_position_embeddings")
        if self.max_length is not None and positions is not None and self.max_length > positions:
            raise ValueError(
                f"max_length={self.max_length} is more than the model's max_position_embeddings={positions}"
            )
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus={self.gpus:g} must be a whole number, or less than 1")
        return self

    @property
    def promised(self) -> bool:
        """Whether another stage has yet to make the checkpoint, so that nothing can be said of it."""
        return self.path.startswith(PREFIX)

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies."""
        return Path(self.path).expanduser()

    @cached_property
    def described(self) -> dict[str, Any]:
        """Its config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def longest(self) -> int:
        """Longest input in tokens."""
        return self.max_length or int(self.described["max_position_embeddings"])

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The checkpoint's own, which need not be the policy's. Raises ValueError for one that loses text."""
        from pipeline.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def time_limit(self, task: Task) -> float:
        """Seconds that one verdict may take."""
        return self.seconds

    def engine_config(self, kv_cache_gib: float) -> RolloutConfig:
        """A vLLM engine for this worker."""
        return RolloutConfig(
            max_model_len=self.longest,
            tensor_parallel_size=max(1, int(self.gpus or 1)),
            kv_cache_gib=kv_cache_gib,
            threads=self.threads,
        )

    def claim_threads(self) -> None:
        """Give this process its CPU threads. Before torch is imported, which counts them."""
        os.environ |= compute_environment(self.threads)


def refuse_idle(judge: Settings, keys: Iterable[str], where: str) -> None:
    """Raise ValueError for the first of `keys` that was given to `judge`, since it has no effect there."""
    for key in keys:
        if key in judge.model_fields_set:
            raise ValueError(f"{key} has no effect {where}; remove it")
