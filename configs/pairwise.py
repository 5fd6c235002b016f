"""Suites that compare a checkpoint's answers with those of baselines."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import PromptData, Source
from configs.model import ModelConfig
from configs.rewards import RewardSpec
from configs.suites import BaseSuite


class AnswersBaseline(Settings):
    """Answers in a file or data set, found by the text of their prompt: another model's, or the records of an earlier
    evaluation (`SUITE.jsonl`)."""

    type: Literal["answers"]
    """Selects this baseline."""
    source: Source
    """Source of the answers."""
    prompt: str = "prompt"
    """Column with the text of the prompt: the last message of the conversation."""
    answer: str = "completion"
    """Column with the answer."""


class CheckpointBaseline(Settings):
    """Greedy answers of another checkpoint, such as an earlier stage's, generated before the evaluation."""

    type: Literal["checkpoint"]
    """Selects this baseline."""
    model: ModelConfig
    """The checkpoint."""


Baseline = Annotated[AnswersBaseline | CheckpointBaseline, Field(discriminator="type")]


class PairwiseSuite(BaseSuite):
    """Answers compared with those of one baseline or several: win rates, the length-controlled win rate of AlpacaEval 2
    (Dubois et al., arXiv:2404.04475), and with several baselines ratings as in Chatbot Arena (Chiang et al.,
    arXiv:2403.04132). One greedy answer a prompt."""

    type: Literal["pairwise"]
    """Selects this form of suite."""
    prompts: PromptData
    """Prompts to answer. Their `truth` plays no part."""
    baselines: dict[str, Baseline] = Field(min_length=1)
    """Opponents by name. With several, all answers are compared with each other and rated."""
    judge: RewardSpec
    """Judge of the answers: any reward that depends on the completion, or a rubric that shows two answers."""
    reads_both: bool = False
    """The judge sees two answers at once: the first as the task's truth ({truth} in a rubric), the second as the
    completion; its score says how much better the second is. Each pair is judged in both orders. Otherwise the judge
    scores each answer by itself, and the higher score wins."""
    scale: list[float] = Field(default_factory=lambda: [1.0, 10.0], min_length=2, max_length=2)
    """With `reads_both`: the scores by which the judge says that the first, and that the second answer wins. Half-way
    is a tie; scores between count by their distance."""
    tie: float = Field(default=0.0, ge=0)
    """Without `reads_both`: largest difference of two scores that is a tie."""
    length_control: bool = True
    """Also report the win rate at equal lengths."""
    difficulty: str | None = None
    """Column with the difficulty of the instruction, a further predictor of the length-controlled win rate."""
    category: str | None = None
    """Column with a category; each gets a win rate of its own."""

    @model_validator(mode="after")
    def _effective(self) -> "PairwiseSuite":
        # Compared with the defaults, since a resolved configuration has every field set.
        if self.prompts.truth not in (None, "truth"):
            raise ValueError(f"prompts.truth='{self.prompts.truth}' has no effect in a comparison; remove it")
        if self.reads_both and self.tie:
            raise ValueError("tie has no effect with reads_both, where the judge says how close two answers are")
        if not self.reads_both and self.scale != [1.0, 10.0]:
            raise ValueError("scale has no effect without reads_both; remove it")
        if self.scale[0] == self.scale[1]:
            raise ValueError(f"scale={self.scale}: the two ends must differ")
        if self.difficulty and not self.length_control:
            raise ValueError("difficulty has no effect with length_control: false; remove it")
        if not all(name.isidentifier() for name in self.baselines):
            raise ValueError(f"baselines={sorted(self.baselines)}: names take letters, digits and _, for figures")
        return self

    def rewards(self) -> list[RewardSpec]:
        return [self.judge]

    def reads(self) -> dict[str, Source | Path]:
        sources = {
            f"baselines.{name}.source": baseline.source
            for name, baseline in self.baselines.items()
            if isinstance(baseline, AnswersBaseline)
        }
        return {"prompts": self.prompts.source, **sources}

    def checkpoints(self) -> dict[str, ModelConfig]:
        return {name: base.model for name, base in self.baselines.items() if isinstance(base, CheckpointBaseline)}
