"""A trained reward model as a reward: RM_helpful, RM_safety, RM_reasoning of DeepSeek-V2 (arXiv:2405.04434, 4.2)."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from pipeline.judging.checkpoint import CheckpointJudge
from rewards.judging.rubric import well_formed
from rewards.plugins.names import JUDGE_CACHE_GIB
from rewards.thinking import answer_alone
from rewards.types import Status, Task, Verdict

Item = tuple[list[dict[str, str]], str]
"""A conversation and an answer to it."""
_HEAD = "score.weight"


class RewardModel(CheckpointJudge):
    """Scores an answer by a trained reward model, read at the answer's last token.

    The reward model's own template and tokenizer render the conversation, by the function that its training uses. The
    score is unbounded: set `mixing` or a weight to match. The completions of a group are scored in one call, packed by
    tokens, with their prompt computed once.
    """

    backend: Literal["torch", "vllm"] = "torch"
    """`torch` runs transformers' model, as training does; `vllm` runs a pooling engine, over several GPUs if needed."""
    reasoning: Literal["keep", "drop"] = "keep"
    """`drop` scores the answer without its chain of thought, as the model was trained with `data.reasoning=drop`."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one forward pass."""
    kv_cache_gib: float = Field(default=JUDGE_CACHE_GIB, gt=0)
    """KV cache of one worker in GiB. Has an effect only with `vllm`."""

    @model_validator(mode="after")
    def _scores(self) -> "RewardModel":
        if self.backend == "torch":
            for key in ("kv_cache_gib", "fp8"):
                if key in self.model_fields_set:
                    raise ValueError(f"{key} has no effect on backend 'torch'; remove it, or set backend: vllm")
            if self.gpus is not None and self.gpus > 1:
                raise ValueError(f"gpus={self.gpus:g}: backend 'torch' uses one; set backend: vllm, or gpus: 1")
        shape = None if self.promised else self._head_shape
        if not self.promised and (shape is None or shape[0] != 1):
            architectures = ", ".join(self.described.get("architectures") or ["no architecture"])
            raise ValueError(
                f"path='{self.path}' is no reward model ({architectures}; {_HEAD} of shape {shape}): it needs a "
                "head for one score; train it in a stage of type 'rm'"
            )
        return self

    def setup(self) -> None:
        """Load the model. Raises ValueError for a checkpoint that is no reward model, or whose tokenizer loses text."""
        self.claim_threads()
        _ = self._score

    def check(self, task: Task) -> None:
        """Raise ValueError if the model's template refuses the conversation, or the prompt is too long."""
        length = len(self._token_ids(task.conversation, ""))
        if length > self.longest:
            raise ValueError(f"the prompt has {length} of its tokens, max_length is {self.longest}")

    def score_batch(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[float | Verdict]:
        """Score the completions; those longer than `max_length` with their conversation get an abstention."""
        if self.reasoning == "drop":
            completions = [answer_alone(completion) for completion in completions]
        items = [(task.conversation, well_formed(text)) for task, text in zip(tasks, completions, strict=True)]
        lengths = [len(self._token_ids(*item)) for item in items]
        fitting = [item for item, length in zip(items, lengths, strict=True) if length <= self.longest]
        scores = iter(self._score(fitting) if fitting else [])
        return [
            next(scores)
            if length <= self.longest
            else Verdict(None, Status.ABSTAIN, f"{length} tokens, max_length is {self.longest}", outcome="too long")
            for length in lengths
        ]

    def _token_ids(self, messages: list[dict[str, str]], answer: str) -> list[int]:
        from pipeline.data.rows import BadRowError
        from pipeline.data.scored import scored_ids

        try:
            prompt_ids, answer_ids = scored_ids(messages, answer, self.tokenizer)
        except BadRowError as error:
            raise ValueError(str(error)) from error
        return prompt_ids + answer_ids

    @cached_property
    def _head_shape(self) -> list[int] | None:
        """Shape of the head's weight, from the safetensors headers."""
        from safetensors import safe_open

        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as tensors:
                if _HEAD in tensors.keys():  # noqa: SIM118  not a dict
                    return list(tensors.get_slice(_HEAD).get_shape())
        return None

    @cached_property
    def _score(self) -> Callable[[list[Item]], list[float]]:
        if self.backend == "torch":
            from pipeline.judging.scorer import Scorer

            return Scorer(self.folder, self.precision, self.batch_tokens).scores
        from rollout.pooling import ScoreEngine

        engine = ScoreEngine(self.folder, self.engine_config(self.kv_cache_gib), self.precision, self.batch_tokens)
        return lambda items: engine.scores([self._token_ids(*item) for item in items])
