"""The base of judges that load a checkpoint.

A reward is constructed in every process that reads a configuration, and a worker sets its threads before torch counts
them. Torch, transformers and vLLM are therefore imported only where a model or tokenizer is needed.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.model import AnyDtype, Dtype
from configs.references import PREFIX
from configs.rewards import PoolName
from configs.sampling import RolloutConfig
from rewards.types import Task
from rollout.checkpoint import resolve_dtype
from rollout.process import compute_environment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CheckpointJudge(Settings):
    """A judge that loads its model from a folder into the judging process in `setup`."""

    pool: ClassVar[PoolName] = "model"

    path: str
    """Folder of the checkpoint; `stage:NAME` takes the result of an earlier stage."""
    dtype: AnyDtype = "float32"
    """Precision of the weights. `auto` takes the checkpoint's."""
    max_length: int | None = Field(default=None, ge=16)
    """Longest input in tokens. A longer input is not judged (`abstain`); a longer prompt is a bad row. None takes the
    model's own `max_position_embeddings`."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    gpus: float | None = Field(default=None, ge=0)
    """GPUs of one worker, apart from those of ranks and engines: a whole number, over which vLLM splits the model, or a
    fraction that judges share. None is one where the cluster has any; 0 computes on the CPU."""
    fp8: list[Literal["weights", "kv_cache"]] = Field(default_factory=list[Literal["weights", "kv_cache"]])
    """Tensors of vLLM in FP8, as `rollout.fp8` has them: half the memory of bfloat16, for coarser scores."""
    seconds: float = Field(default=30.0, gt=0)
    """Time limit of one verdict; the verdicts of a group come from one call and share the sum."""
    start_seconds: float = Field(default=600.0, gt=0)
    """Time limit for a worker to load the model."""

    @model_validator(mode="after")
    def _sound(self) -> "CheckpointJudge":
        if "weights" in self.fp8 and self.dtype == "float32":
            raise ValueError("fp8: 'weights' are quantised from bfloat16; set dtype: bfloat16, or remove it")
        if self.promised:
            return self
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"path='{self.path}' has no config.json (from {Path.cwd()}); give a checkpoint's folder")
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
        """True for the result of another stage, which may not exist yet."""
        return self.path.startswith(PREFIX)

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.path).expanduser()

    @property
    def precision(self) -> Dtype:
        """Precision in which the weights are loaded."""
        return resolve_dtype(self.dtype, self.folder)

    @cached_property
    def described(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def longest(self) -> int:
        """Longest input in tokens."""
        return self.max_length or int(self.described["max_position_embeddings"])

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The checkpoint's own tokenizer. Raises ValueError for one that loses text."""
        from pipeline.models.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    def time_limit(self, task: Task) -> float:
        """Return the time limit of one verdict in seconds."""
        return self.seconds

    def engine_config(self, kv_cache_gib: float) -> RolloutConfig:
        """Return the settings of this worker's vLLM engine."""
        return RolloutConfig(
            max_model_len=self.longest,
            tensor_parallel_size=max(1, int(self.gpus or 1)),
            kv_cache_gib=kv_cache_gib,
            fp8=self.fp8,
            threads=self.threads,
        )

    def claim_threads(self) -> None:
        """Set this process's CPU threads. Must run before torch is imported, which counts them."""
        os.environ |= compute_environment(self.threads)
