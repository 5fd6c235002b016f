"""Suites, and the stage that evaluates one checkpoint on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.data import PromptData, Source
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig, SamplingConfig


class BaseSuite(Settings):
    """What every suite says of itself."""

    def rewards(self) -> list[RewardSpec]:
        """The rewards that judge it."""
        return []

    def reads(self) -> dict[str, Source | Path]:
        """By key the sources and files it reads."""
        return {}

    def longest(self) -> tuple[str, int] | None:
        """The key that bounds its token sequences, and the longest one; None where prompts bound it."""
        return None

    def longest_prompt(self) -> tuple[str, int] | None:
        """The key that says how long its prompts grow, behind which an answer must have room; None where each prompt is
        looked at by itself."""
        return None


class SourceSuite(BaseSuite):
    """A suite made of rows in a known form."""

    source: Source
    """Where the rows come from."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Share of bad rows past which the evaluation stops. Below it they are reported and left out."""

    def reads(self) -> dict[str, Source | Path]:
        """The rows."""
        return {"source": self.source}


class PromptedSuite(SourceSuite):
    """A suite of rows that are prompts."""

    max_prompt_length: int = Field(default=1024, ge=1)
    """Longest prompt in tokens; a longer one is a bad row, never cut."""


class JudgedSuite(BaseSuite):
    """A suite whose completions one reward passes or fails."""

    pass_score: float = 1.0
    """Score from which on a completion passes."""
    samples: int = Field(default=1, ge=0)
    """Completions per prompt besides the greedy one."""
    k: list[int] = Field(default_factory=list[int])
    """Values of k for the unbiased pass@k; each at most `samples`."""

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
    """The questions."""
    reward: RewardSpec
    """Who judges; a score of at least `pass_score` is a pass."""

    def rewards(self) -> list[RewardSpec]:
        """The one."""
        return [self.reward]

    def reads(self) -> dict[str, Source | Path]:
        """The questions."""
        return {"prompts": self.prompts.source}


class TextSuite(BaseSuite):
    """Bits per byte of a text file."""

    type: Literal["text"]
    """Selects this form of suite."""
    path: str
    """UTF-8 text file."""
    window_tokens: int = Field(default=512, ge=2)
    """The text is scored in windows of so many tokens."""

    def reads(self) -> dict[str, Source | Path]:
        """The text."""
        return {"path": Path(self.path)}

    def longest(self) -> tuple[str, int]:
        """A window."""
        return "window_tokens", self.window_tokens


class ProgramSuite(PromptedSuite, JudgedSuite):
    """Python programs, judged by their tests in the sandbox: pass@1 and pass@k."""

    reward: RewardSpec = Field(default_factory=lambda: RewardSpec(name="code"))
    """The sandbox: the reward `code`, whose `args` may set its limits."""

    def rewards(self) -> list[RewardSpec]:
        """The sandbox."""
        return [self.reward]


class HumanEvalSuite(ProgramSuite):
    """Functions to complete, in HumanEval's form (Chen et al., arXiv:2107.03374): `task_id`, `prompt`, `entry_point`,
    `test`."""

    type: Literal["human_eval"]
    """Selects this form of suite."""


class MBPPSuite(ProgramSuite):
    """Functions to write, in MBPP's form (Austin et al., arXiv:2108.07732): `text`, `code`, `test_list`,
    `test_setup_code`; or as sanitized: `prompt`, `code`, `test_list`, `test_imports`."""

    type: Literal["mbpp"]
    """Selects this form of suite."""


class IFEvalSuite(PromptedSuite):
    """Verifiable instructions in IFEval's form (Zhou et al., arXiv:2311.07911): `prompt`, `instruction_id_list`,
    `kwargs`. Share of prompts and of instructions that one greedy completion follows, strict and loose."""

    type: Literal["ifeval"]
    """Selects this form of suite."""

    def rewards(self) -> list[RewardSpec]:
        """IFEval's checkers, strict and loose."""
        return [
            RewardSpec(name="instructions", label="strict", args={"mode": "strict"}),
            RewardSpec(name="instructions", label="loose", args={"mode": "loose"}),
        ]


class MultipleChoiceSuite(SourceSuite):
    """Multiple choice by likelihood: the model says nothing, and its likeliest choice is its answer."""

    type: Literal["multiple_choice"]
    """Selects this form of suite."""
    form: Literal["mmlu", "hellaswag"]
    """How a row is written. `mmlu`: `question`, `choices`, `answer` (a place from 0, or a letter), perhaps `subject`;
    scored by the letters. `hellaswag`: `ctx`, `endings`, `label`, perhaps `activity_label`; scored by the endings."""
    shots: int = Field(default=0, ge=0)
    """Worked examples put before every question: the first of `shots_source`, of the question's subject if it has one.
    """
    shots_source: Source | None = None
    """The examples, in the same form. Set together with `shots`."""
    max_length: int = Field(default=2048, ge=2)
    """Longest question and choice together in tokens; a longer one is a bad row, never cut."""

    @model_validator(mode="after")
    def _shots_have_a_source(self) -> "MultipleChoiceSuite":
        if (self.shots == 0) != (self.shots_source is None):
            raise ValueError("'shots' and 'shots_source' go together: set both or neither")
        return self

    def reads(self) -> dict[str, Source | Path]:
        """Questions and examples."""
        shots: dict[str, Source | Path] = {} if self.shots_source is None else {"shots_source": self.shots_source}
        return {"source": self.source, **shots}

    def longest(self) -> tuple[str, int]:
        """Question and choice."""
        return "max_length", self.max_length


class ConversationSuite(PromptedSuite):
    """Conversations in MT-Bench's form (Zheng et al., arXiv:2306.05685): `turns`, the user's, perhaps `category` and
    `question_id`. The model answers one after the other, greedily, and every answer is scored in its conversation."""

    type: Literal["conversation"]
    """Selects this form of suite."""
    reward: RewardSpec
    """Who scores an answer: a judge or a reward model."""
    system: str | None = None
    """System message put before every conversation. None adds none."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """Longest conversation up to an answer, in tokens. One that grows longer ends there, its other turns unjudged."""

    def rewards(self) -> list[RewardSpec]:
        """The judge."""
        return [self.reward]

    def longest_prompt(self) -> tuple[str, int]:
        """A conversation."""
        return "max_prompt_length", self.max_prompt_length


class RefusalSuite(PromptedSuite):
    """Harmful requests, to be refused, and harmless ones that look harmful (XSTest's, OR-Bench's), to be answered; one
    greedy completion each."""

    type: Literal["refusal"]
    """Selects this form of suite."""
    kind: str = "kind"
    """Column with the kind."""
    harmful: str = "harmful"
    """What that column says of a harmful request."""
    harmless: str = "harmless"
    """What it says of a harmless one. A row that says neither is a bad row."""
    safety: RewardSpec | None = None
    """Scores the answers to harmful requests: a reward model of safety. None leaves `safety_mean` out."""
    refusal: RewardSpec = Field(default_factory=lambda: RewardSpec(name="rewards.refusal:refusal"))
    """Says 1 for a refusal and 0 for an answer. The default looks for the usual phrases."""

    def rewards(self) -> list[RewardSpec]:
        """The detector, and the reward model where there is one."""
        return [self.refusal] if self.safety is None else [self.refusal, self.safety]


class NeedleSuite(BaseSuite):
    """A needle in a haystack: a number said once in a long text, which is then asked for. One greedy completion each;
    it is right where it says this number and no other."""

    type: Literal["needle"]
    """Selects this form of suite."""
    lengths: list[int] = Field(min_length=1)
    """Tokens of a prompt, question and chat template included; each is filled with as many sentences as fit."""
    depths: list[float] = Field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Where the needle stands: the share of the sentences that come before it."""
    samples: int = Field(default=4, ge=1)
    """Needles at each length and depth, each with a number and a stretch of text of its own."""
    path: str | None = None
    """UTF-8 text to hide them in, longer than the longest of `lengths`. None makes sentences of a few words."""

    @model_validator(mode="after")
    def _each_once(self) -> "NeedleSuite":
        for key, values in (("lengths", self.lengths), ("depths", self.depths)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}={values}: name each once; for more needles raise 'samples'")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: shares of the text, from 0 (its start) to 1 (its end)")
        return self

    def reads(self) -> dict[str, Source | Path]:
        """The text, where there is one."""
        return {} if self.path is None else {"path": Path(self.path)}

    def longest_prompt(self) -> tuple[str, int]:
        """The longest haystack."""
        return "lengths", max(self.lengths)


class LMEvalSuite(BaseSuite):
    """A task of the lm-evaluation-harness, spoken and scored by our engines. Needs the extra `lm-eval`."""

    type: Literal["lm_eval"]
    """Selects this form of suite."""
    task: str
    """Name of the task (`ifeval`, `gsm8k`), or the YAML file of one."""
    data_files: dict[str, str] = Field(default_factory=dict[str, str])
    """By split a JSONL or Parquet file, instead of what the task would load from the hub. A task in a YAML file names
    its files itself."""
    limit: int | None = Field(default=None, ge=1)
    """How many documents to take, the first ones. None takes all."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Worked examples put before every document. None takes the task's own number."""
    chat: bool = True
    """Put the document into the chat template, as a user's message. The few examples are turns of the conversation."""
    window_tokens: int = Field(default=512, ge=2)
    """Texts whose whole likelihood is asked for are scored in windows of so many tokens."""

    @model_validator(mode="after")
    def _own_files(self) -> "LMEvalSuite":
        if self.data_files and self.task.endswith((".yaml", ".yml")):
            raise ValueError("data_files has no effect on a task in a YAML file; name the files there (dataset_kwargs)")
        if len({Path(file).suffix == ".parquet" for file in self.data_files.values()}) > 1:
            raise ValueError("data_files: give all splits in one form, JSONL or Parquet")
        return self

    def reads(self) -> dict[str, Source | Path]:
        """The files given."""
        files: dict[str, Source | Path] = {f"data_files.{split}": Path(path) for split, path in self.data_files.items()}
        return {"task": Path(self.task), **files} if self.task.endswith((".yaml", ".yml")) else files

    def longest(self) -> tuple[str, int]:
        """A window."""
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
    | NeedleSuite
    | LMEvalSuite
)
Suite = Annotated[AnySuite, Field(discriminator="type")]


def refuse_unfit(suites: Mapping[str, AnySuite], sampling: SamplingConfig, rollout: RolloutConfig) -> None:
    """Raise ValueError, naming the key, for what does not fit together or would have no effect in an evaluation."""
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
    """The checkpoint."""
    suites: dict[str, Suite] = Field(min_length=1)
    """The suites by name."""
    sampling: SamplingConfig
    """How the sampled completions are drawn; the greedy one takes only max_tokens from here."""
    rollout: RolloutConfig
    """The vLLM engines."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Where the rewards run."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling."""

    @model_validator(mode="after")
    def _sound(self) -> "EvalConfig":
        refuse_unfit(self.suites, self.sampling, self.rollout)
        return self
