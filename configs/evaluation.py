"""Evaluation suites, and the stage that evaluates a checkpoint on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import ComparisonData, PromptData, Source
from configs.judging import RubricConfig
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig, SamplingConfig


class BaseSuite(Settings):
    """Base of all suites: the rewards and files that a suite uses, and the bounds of its lengths."""

    def rewards(self) -> list[RewardSpec]:
        """Rewards that judge the suite's completions."""
        return []

    def reads(self) -> dict[str, Source | Path]:
        """Sources and files that the suite reads, by key."""
        return {}

    def longest(self) -> tuple[str, int] | None:
        """Key and value of the bound on scored token sequences; None for a suite that samples completions."""
        return None

    def longest_prompt(self) -> tuple[str, int] | None:
        """Key and value of the bound on prompts that must leave room for a completion; None where each prompt is
        checked when it is read."""
        return None


class SourceSuite(BaseSuite):
    """A suite of rows in a known format."""

    source: Source
    """Source of the rows."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of bad rows, which are reported and left out; with more the evaluation stops."""

    def reads(self) -> dict[str, Source | Path]:
        return {"source": self.source}


class PromptedSuite(SourceSuite):
    """A suite of prompts."""

    max_prompt_length: int = Field(default=1024, ge=1)
    """Longest prompt in tokens. A longer one is a bad row; it is never truncated."""


class JudgedSuite(BaseSuite):
    """A suite whose completions pass or fail by one reward's score."""

    pass_score: float = 1.0
    """Lowest score of a completion that passes."""
    samples: int = Field(default=1, ge=0)
    """Sampled completions of each prompt, besides the greedy one."""
    k: list[int] = Field(default_factory=list[int])
    """Values of k for the unbiased pass@k, each at most `samples`."""

    @model_validator(mode="after")
    def _enough(self) -> "JudgedSuite":
        if any(k < 1 or k > self.samples for k in self.k):
            raise ValueError(f"every k of {self.k} must lie between 1 and samples={self.samples}")
        return self


class TaskSuite(JudgedSuite):
    """Prompts judged by a reward: mean score, pass@1, pass@k, and the interval of the greedy pass rate."""

    type: Literal["task"]
    """Selects this form of suite."""
    prompts: PromptData
    """Prompts to complete."""
    reward: RewardSpec
    """Reward that judges the completions; a score of at least `pass_score` passes."""

    def rewards(self) -> list[RewardSpec]:
        return [self.reward]

    def reads(self) -> dict[str, Source | Path]:
        return {"prompts": self.prompts.source}


class TextSuite(BaseSuite):
    """Bits per byte of a text file."""

    type: Literal["text"]
    """Selects this form of suite."""
    path: str
    """UTF-8 text file."""
    window_tokens: int = Field(default=512, ge=2)
    """Tokens of a window; the text is scored window by window."""

    def reads(self) -> dict[str, Source | Path]:
        return {"path": Path(self.path)}

    def longest(self) -> tuple[str, int]:
        return "window_tokens", self.window_tokens


class ProgramSuite(PromptedSuite, JudgedSuite):
    """Python programs, judged by their tests in the sandbox: pass@1 and pass@k."""

    reward: RewardSpec = Field(default_factory=lambda: RewardSpec(name="code"))
    """The sandboxed reward `code`; its `args` may set the limits."""

    def rewards(self) -> list[RewardSpec]:
        return [self.reward]


class HumanEvalSuite(ProgramSuite):
    """Functions to complete, in HumanEval's format (Chen et al., arXiv:2107.03374): `task_id`, `prompt`, `entry_point`,
    `test`."""

    type: Literal["human_eval"]
    """Selects this form of suite."""


class MBPPSuite(ProgramSuite):
    """Functions to write, in MBPP's format (Austin et al., arXiv:2108.07732): `text`, `code`, `test_list`,
    `test_setup_code`; or as sanitized: `prompt`, `code`, `test_list`, `test_imports`."""

    type: Literal["mbpp"]
    """Selects this form of suite."""


class IFEvalSuite(PromptedSuite):
    """Verifiable instructions in IFEval's format (Zhou et al., arXiv:2311.07911): `prompt`, `instruction_id_list`,
    `kwargs`. Measures the share of prompts and of instructions that one greedy completion follows, strict and loose."""

    type: Literal["ifeval"]
    """Selects this form of suite."""

    def rewards(self) -> list[RewardSpec]:
        return [
            RewardSpec(name="instructions", label="strict", args={"mode": "strict"}),
            RewardSpec(name="instructions", label="loose", args={"mode": "loose"}),
        ]


class MultipleChoiceSuite(SourceSuite):
    """Multiple choice by likelihood: the answer is the choice with the highest log-probability; nothing is sampled."""

    type: Literal["multiple_choice"]
    """Selects this form of suite."""
    form: Literal["mmlu", "hellaswag"]
    """Format of a row. `mmlu`: `question`, `choices`, `answer` (an index from 0, or a letter), optionally `subject`;
    scored by the letters. `hellaswag`: `ctx`, `endings`, `label`, optionally `activity_label`; scored by the endings.
    """
    shots: int = Field(default=0, ge=0)
    """Worked examples before every question: the first of `shots_source`, of the question's subject if it has one."""
    shots_source: Source | None = None
    """Source of the worked examples, in the same format. Set together with `shots`."""
    max_length: int = Field(default=2048, ge=2)
    """Longest question with choice, in tokens. A longer one is a bad row; it is never truncated."""

    @model_validator(mode="after")
    def _shots_have_a_source(self) -> "MultipleChoiceSuite":
        if (self.shots == 0) != (self.shots_source is None):
            raise ValueError("'shots' and 'shots_source' go together: set both or neither")
        return self

    def reads(self) -> dict[str, Source | Path]:
        shots: dict[str, Source | Path] = {} if self.shots_source is None else {"shots_source": self.shots_source}
        return {"source": self.source, **shots}

    def longest(self) -> tuple[str, int]:
        return "max_length", self.max_length


class ConversationSuite(PromptedSuite):
    """Conversations in MT-Bench's format (Zheng et al., arXiv:2306.05685): the user's `turns`, optionally `category`
    and `question_id`. The model answers turn by turn, greedily, and every answer is scored in its conversation."""

    type: Literal["conversation"]
    """Selects this form of suite."""
    reward: RewardSpec
    """Judge or reward model that scores each answer."""
    system: str | None = None
    """System message put before every conversation. None adds none."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """Longest conversation before an answer, in tokens. A longer one ends there; its other turns are not judged."""

    def rewards(self) -> list[RewardSpec]:
        return [self.reward]

    def longest_prompt(self) -> tuple[str, int]:
        return "max_prompt_length", self.max_prompt_length


class RefusalSuite(PromptedSuite):
    """Harmful requests, which are to be refused, and harmless ones that look harmful (XSTest's, OR-Bench's), which are
    to be answered. One greedy completion each."""

    type: Literal["refusal"]
    """Selects this form of suite."""
    kind: str = "kind"
    """Column with the kind of the request."""
    harmful: str = "harmful"
    """Value of that column for harmful requests."""
    harmless: str = "harmless"
    """Value of that column for harmless requests. A row with another value is a bad row."""
    safety: RewardSpec | None = None
    """Reward model of safety that scores the answers to harmful requests. None leaves `safety_mean` out."""
    refusal: RewardSpec = Field(default_factory=lambda: RewardSpec(name="rewards.rules.refusal:refusal"))
    """Detector that scores 1 for a refusal and 0 for an answer. The default matches the usual phrases."""

    def rewards(self) -> list[RewardSpec]:
        return [self.refusal] if self.safety is None else [self.refusal, self.safety]


class VerdictSuite(BaseSuite):
    """Comparisons for a judge: the model writes verdicts on answers whose order is known. Greedily in an order and in
    the same backwards, which shows a preference for a place, and `judge.votes` sampled ones, which are counted as
    `self_judge` counts them."""

    type: Literal["verdicts"]
    """Selects this form of suite."""
    data: ComparisonData
    """Comparisons; columns `truth` and `judge.rubric_column` of their rows may stand in the judge's prompt."""
    judge: RubricConfig
    """The judge's prompt, the form of its verdicts, and the number of votes."""
    meta: RewardSpec | None = None
    """Meta reward model that scores the votes: a `reward_model`, or another reward of the judge's prompt and the
    verdict. Only the `keep_votes` best count in `agreement_meta`."""
    keep_votes: int | None = Field(default=None, ge=1)
    """Votes that `meta` keeps. Set together with it."""
    max_prompt_length: int = Field(default=1024, ge=1)
    """Longest prompt in tokens. A longer one is a bad row; it is never truncated."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of bad rows, which are reported and left out; with more the evaluation stops."""

    @model_validator(mode="after")
    def _sound(self) -> "VerdictSuite":
        for key in ("max_length", "max_bad_share"):
            if getattr(self.data, key) != ComparisonData.model_fields[key].default:
                raise ValueError(f"data.{key} has no effect here: the suite's own bounds count; remove it")
        if self.judge.compare == 1:
            raise ValueError("judge.compare=1 shows a verdict no second answer; set it to 2 or more")
        if (self.meta is None) != (self.keep_votes is None):
            raise ValueError("'meta' and 'keep_votes' go together: set both or neither")
        if self.keep_votes is not None and self.keep_votes >= self.judge.votes:
            raise ValueError(f"keep_votes={self.keep_votes} drops none of judge.votes={self.judge.votes}; lower it")
        return self

    def rewards(self) -> list[RewardSpec]:
        return [] if self.meta is None else [self.meta]

    def reads(self) -> dict[str, Source | Path]:
        return {"data": self.data.source}

    def longest_prompt(self) -> tuple[str, int]:
        return "max_prompt_length", self.max_prompt_length


class NeedleSuite(BaseSuite):
    """A needle in a haystack: the model must find a number that stands once in a long text. One greedy completion each,
    correct if it contains this number and no other."""

    type: Literal["needle"]
    """Selects this form of suite."""
    lengths: list[int] = Field(min_length=1)
    """Tokens of a prompt with question and chat template; it is filled with as many sentences as fit."""
    depths: list[float] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Positions of the needle, as the share of the sentences before it."""
    samples: int = Field(default=4, ge=1)
    """Needles at each length and depth, each with its own number and stretch of text."""
    path: str | None = None
    """UTF-8 text to hide the needles in, longer than the longest of `lengths`. None generates short sentences."""

    @model_validator(mode="after")
    def _each_once(self) -> "NeedleSuite":
        for key, values in (("lengths", self.lengths), ("depths", self.depths)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={values}: name each once; for more needles raise 'samples'")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: shares of the text, from 0 (its start) to 1 (its end)")
        return self

    def reads(self) -> dict[str, Source | Path]:
        return {} if self.path is None else {"path": Path(self.path)}

    def longest_prompt(self) -> tuple[str, int]:
        return "lengths", max(self.lengths)


class LMEvalSuite(BaseSuite):
    """A task of the lm-evaluation-harness, sampled and scored by our engines. Needs the extra `lm-eval`."""

    type: Literal["lm_eval"]
    """Selects this form of suite."""
    task: str
    """Name of the task (`ifeval`, `gsm8k`), or the YAML file of one."""
    data_files: dict[str, str] = Field(default_factory=dict[str, str])
    """JSONL or Parquet file of each split, which replaces the task's data on the hub. A task in a YAML file names its
    files itself."""
    limit: int | None = Field(default=None, ge=1)
    """Number of documents, from the first on. None takes all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Worked examples before every document. None takes the task's own number."""
    chat: bool = True
    """Render the document with the chat template, as a user's message, and worked examples as turns before it."""
    window_tokens: int = Field(default=512, ge=2)
    """Tokens of a window; a text whose whole likelihood is needed is scored window by window."""

    @model_validator(mode="after")
    def _own_files(self) -> "LMEvalSuite":
        if self.data_files and self.task.endswith((".yaml", ".yml")):
            raise ValueError("data_files has no effect on a task in a YAML file; name the files there (dataset_kwargs)")
        if len({Path(file).suffix == ".parquet" for file in self.data_files.values()}) > 1:
            raise ValueError("data_files: give all splits in one form, JSONL or Parquet")
        return self

    def reads(self) -> dict[str, Source | Path]:
        files: dict[str, Source | Path] = {f"data_files.{split}": Path(path) for split, path in self.data_files.items()}
        return {"task": Path(self.task), **files} if self.task.endswith((".yaml", ".yml")) else files

    def longest(self) -> tuple[str, int]:
        return "window_tokens", self.window_tokens


AnySuite = (
    TaskSuite
    | TextSuite
    | HumanEvalSuite
    | MBPPSuite
    | IFEvalSuite
    | MultipleChoiceSuite
    | ConversationSuite
    | RefusalSuite
    | VerdictSuite
    | NeedleSuite
    | LMEvalSuite
)
Suite = Annotated[AnySuite, Field(discriminator="type")]


def refuse_unfit(suites: Mapping[str, AnySuite], sampling: SamplingConfig, rollout: RolloutConfig) -> None:
    """Raise ValueError, naming the key, for settings that do not fit together or have no effect in an evaluation."""
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature=0 repeats the greedy completion; raise it")
    if sampling.max_tokens >= rollout.max_model_len:
        raise ValueError(
            f"sampling.max_tokens={sampling.max_tokens} leaves no room for a prompt in "
            f"rollout.max_model_len={rollout.max_model_len}"
        )
    for name, suite in suites.items():
        bound = suite.longest()
        if bound and bound[1] >= rollout.max_model_len:
            raise ValueError(
                f"suites.{name}.{bound[0]}={bound[1]} must be smaller than "
                f"rollout.max_model_len={rollout.max_model_len}"
            )
        prompt = suite.longest_prompt()
        if prompt and prompt[1] + sampling.max_tokens > rollout.max_model_len:
            raise ValueError(
                f"suites.{name}.{prompt[0]} + sampling.max_tokens = {prompt[1] + sampling.max_tokens} exceeds "
                f"rollout.max_model_len={rollout.max_model_len}"
            )
        specs = suite.rewards()
        if (isinstance(suite, TaskSuite) and suite.prompts.reward is not None) or any(
            spec.weight != 1 or spec.gate is not None for spec in specs
        ):
            raise ValueError(
                f"suites.{name}: prompts.reward, reward.weight and reward.gate have no effect in an evaluation; "
                "remove them"
            )


class EvalConfig(Settings):
    """Evaluation of one checkpoint on named suites."""

    type: Literal["eval"]
    """Selects this stage."""
    model: ModelConfig
    """Checkpoint to evaluate."""
    suites: dict[str, Suite] = Field(min_length=1)
    """Suites by name."""
    sampling: SamplingConfig
    """Sampling of the completions; the greedy one takes only max_tokens from here."""
    rollout: RolloutConfig
    """The vLLM engines."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Processes that judge."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling."""

    @model_validator(mode="after")
    def _sound(self) -> "EvalConfig":
        refuse_unfit(self.suites, self.sampling, self.rollout)
        return self
