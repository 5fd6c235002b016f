"""Models and their precision."""

from typing import Literal

from pydantic import model_validator

from configs.base import Settings

Dtype = Literal["float32", "bfloat16"]
"""Precision of a model's weights in the forward pass."""
AnyDtype = Literal["auto", "float32", "bfloat16"]
"""The same as a setting; `auto` is the checkpoint's (rollout.checkpoint.resolve_dtype)."""


class ModelConfig(Settings):
    """A language model as a `transformers` checkpoint."""

    path: str
    """Folder, hub name or address (`s3://...`: docs/storage.md) of the checkpoint; `stage:NAME` takes the result of an
    earlier stage."""
    dtype: AnyDtype = "float32"
    """Precision of the weights in the forward pass, in training and rollout alike. `auto` takes the checkpoint's:
    `dtype` in its config.json, and bfloat16 for one in FP8."""
    chat_template: str | None = None
    """Chat template that replaces the checkpoint's: a Jinja file, or the name of a shipped one (`chatml`, `llama3` and
    others: docs/sft.md). None keeps the checkpoint's."""


class FirstModelConfig(Settings):
    """The first model of a recipe: a checkpoint, or a new model of a given architecture."""

    path: str | None = None
    """Folder, hub name or address (`s3://...`: docs/storage.md) of the checkpoint; `stage:NAME` takes the result of an
    earlier stage."""
    init_config: str | None = None
    """`transformers` config.json of a new model: a file, or the name of a shipped one (`tiny`, a DeepSeek-V3 of 2
    million parameters; `moe_25m`, of 25 million). Exactly one of `path` and `init_config` is set."""
    init_seed: int = 0
    """Seed of a new model's weights. Has an effect only with `init_config`."""
    dtype: AnyDtype = "float32"
    """Precision of the weights in the forward pass. `auto` takes the checkpoint's: `dtype` in its config.json, and
    bfloat16 for one in FP8; a new model is float32."""
    chat_template: str | None = None
    """Chat template that replaces the checkpoint's: a Jinja file, or the name of a shipped one (`chatml`, `llama3` and
    others: docs/sft.md). None keeps the checkpoint's."""

    @model_validator(mode="after")
    def _one_origin(self) -> "FirstModelConfig":
        if (self.path is None) == (self.init_config is None):
            raise ValueError("set exactly one of 'path' and 'init_config'")
        if self.init_config is not None and self.chat_template is not None:
            raise ValueError("chat_template has no effect with init_config, whose tokenizer brings its own; remove it")
        return self
