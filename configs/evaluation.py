"""Evaluation suites, and the stage that evaluates a checkpoint on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from configs.base import Settings, fit_default
from configs.data import ComparisonData, PromptData, Source
from configs.judging import RubricConfig
from configs.model import ModelConfig
from configs.named_suites import expand_suites
from configs.pairwise import PairwiseSuite
from configs.program_suites import CruxEvalSuite, HumanEvalSuite, LiveCodeBenchSuite, MBPPSuite
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import RolloutConfig, SamplingConfig
from configs.suites import BaseSuite, JudgedSuite, PromptedSuite, ShotSuite


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
    """Tokens of a window; the text is scored window by window. Unset, at most `rollout.max_model_len` - 1."""

    def reads(self) -> dict[str, Source | Path]:
        return {"path": Path(self.path)}

    def longest(self) -> tuple[str, int]:
        return "window_tokens", self.window_tokens


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


class MultipleChoiceSuite(ShotSuite):
    """Multiple choice by likelihood: the answer is the choice with the highest log-probability; nothing is sampled.
    Examples are those of the question's subject, if it has one."""

    type: Literal["multiple_choice"]
    """Selects this form of suite."""
    form: Literal["mmlu", "hellaswag", "ceval"]
    """Format of a row. `mmlu`: `question`, `choices`, `answer` (an index from 0, or a letter), optionally `subject`;
    scored by the letters. `hellaswag`: `ctx`, `endings`, `label`, optionally `activity_label`; scored by the endings.
    `ceval`: the Chinese exams C-Eval and CMMLU, `question`, `A` to `D`, `answer` (a letter), optionally `subject`;
    scored by the letters, in a Chinese frame. Capitals in column names make no difference."""
    max_length: int = Field(default=2048, ge=2)
    """Longest question with choice, in tokens. A longer one is a bad row; it is never truncated."""

    def longest(self) -> tuple[str, int]:
        return "max_length", self.max_length


class QuestionSuite(PromptedSuite, JudgedSuite, ShotSuite):
    """Questions made of a row's columns, after worked examples as earlier turns; the completions are judged."""

    type: Literal["questions"]
    """Selects this form of suite."""
    question: str
    """Text of a question. `{column}` and `{column[key]}` stand for the row's values: "{text} Who is {target[name]}?"
    """
    answer: str
    """Text of the true answer, in the same way."""
    labels: dict[str, str] = Field(default_factory=dict[str, str])
    """Texts of the answers that `answer` gives as labels, such as {"0": no, "1": yes}."""
    shown: str | None = None
    """Text of an example's answer, in the same way, such as a worked solution. None shows `answer`."""
    reward: RewardSpec
    """Reward that judges the completions; `answer` is the truth."""

    def rewards(self) -> list[RewardSpec]:
        return [self.reward]


class ConversationSuite(PromptedSuite):
    """Conversations in MT-Bench's format (Zheng et al., arXiv:2306.05685): the user's `turns`, optionally `category`,
    and `reference`, an answer to each turn; or in AlignBench's (Liu et al., arXiv:2311.18743): `question`, `category`,
    `reference`. The model answers turn by turn, and every answer is scored in its conversation."""

    type: Literal["conversation"]
    """Selects this form of suite."""
    reward: RewardSpec
    """Judge or reward model that scores each answer."""
    reference_reward: RewardSpec | None = None
    """Judge of turns with a reference answer, the task's truth ({truth} in a rubric). None leaves them to `reward`."""
    temperatures: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict[str, float])
    """Sampling temperature of the answers by category, as MT-Bench sets them. Others are greedy."""
    groups: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """Categories of each group. A group's score is the mean of its categories' scores, and the overall score the mean
    of the groups', as AlignBench reports them."""
    system: str | None = None
    """System message put before every conversation. None adds none."""
    max_prompt_length: int = Field(default=2048, ge=1)
    """Longest conversation before an answer, in tokens. A longer one ends there; its other turns are not judged."""

    def rewards(self) -> list[RewardSpec]:
        return [self.reward] if self.reference_reward is None else [self.reward, self.reference_reward]

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
    """Tokens of a window; a text whose whole likelihood is needed is scored window by window. Unset, at most
    `rollout.max_model_len` - 1."""

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
    | LiveCodeBenchSuite
    | CruxEvalSuite
    | QuestionSuite
    | IFEvalSuite
    | MultipleChoiceSuite
    | ConversationSuite
    | PairwiseSuite
    | RefusalSuite
    | VerdictSuite
    | NeedleSuite
    | LMEvalSuite
)
Suite = Annotated[AnySuite, Field(discriminator="type")]


NamedSuites = Annotated[dict[str, Suite], BeforeValidator(expand_suites)]


def fit_suites(suites: Mapping[str, AnySuite], sampling: SamplingConfig, rollout: RolloutConfig) -> None:
    """Lower the bounds of lengths that were not set to what the engines take. Raise ValueError, naming the key, for
    settings that do not fit together or have no effect in an evaluation."""
    if sampling.temperature == 0:
        raise ValueError("sampling.temperature=0 repeats the greedy completion; raise it")
    if sampling.max_tokens >= rollout.max_model_len:
        raise ValueError(
            f"sampling.max_tokens={sampling.max_tokens} leaves no room for a prompt in "
            f"rollout.max_model_len={rollout.max_model_len}"
        )
    for name, suite in suites.items():
        if bound := suite.longest():
            fit_default(suite, bound[0], rollout.max_model_len - 1)
        if prompt := suite.longest_prompt():
            fit_default(suite, prompt[0], rollout.max_model_len - sampling.max_tokens)
        bound, prompt = suite.longest(), suite.longest_prompt()
        if bound and bound[1] >= rollout.max_model_len:
            raise ValueError(
                f"suites.{name}.{bound[0]}={bound[1]} must be smaller than "
                f"rollout.max_model_len={rollout.max_model_len}"
            )
        if prompt and prompt[1] + sampling.max_tokens > rollout.max_model_len:
            raise ValueError(
                f"suites.{name}.{prompt[0]} + sampling.max_tokens = {prompt[1] + sampling.max_tokens} exceeds "
                f"rollout.max_model_len={rollout.max_model_len}"
            )
        specs = suite.rewards()
        if (isinstance(suite, TaskSuite | PairwiseSuite) and suite.prompts.reward is not None) or any(
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
    suites: NamedSuites = Field(min_length=1)
    """Suites by name; or the name of a shipped list of them (`deepseek_v2_chat`), or a list with changes, as in `{list:
    deepseek_v2_chat, only: [mmlu], data: FOLDER, judge: {url: URL, model: NAME}}` (docs/evaluation.md)."""
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
        fit_suites(self.suites, self.sampling, self.rollout)
        return self
