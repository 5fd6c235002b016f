"""Sources of conversations, prompts, comparisons and texts."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from configs.base import Settings


class FileSource(Settings):
    """Rows of JSONL or Parquet files."""

    type: Literal["file"]
    """Selects this source."""
    paths: list[str] = Field(min_length=1)
    """Files or glob patterns, read in sorted order: `.jsonl`, `.jsonl.gz` or `.parquet`. The name of an existing file
    is not read as a pattern, even with brackets in it (`data[1].jsonl`). Addresses that `fsspec` reads, such as
    `s3://corpus/part-*.jsonl`, are fetched into the cache (docs/storage.md)."""


class HubSource(Settings):
    """Rows of a data set on the hub, through `datasets`."""

    type: Literal["hub"]
    """Selects this source."""
    path: str
    """Name of the data set, as `datasets.load_dataset` takes it."""
    name: str | list[str] | None = None
    """Configuration of the data set, or several, one after the other; their rows get its name as the column `subject`.
    None takes its default."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit or tag to pin. None takes the newest."""


class GymSource(Settings):
    """Procedural tasks of `reasoning_gym`, each scored by its own verifier."""

    type: Literal["reasoning_gym"]
    """Selects this source."""
    task: str
    """Name of the task, as `reasoning_gym.create_dataset` takes it."""
    size: int = Field(ge=1)
    """Number of rows to generate."""
    seed: int = 0
    """Seed of the generator."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the task."""


COLUMN = "column:"
"""Prefix of a column's name, in settings that take either one value for all rows or a column."""


SumsShare = Literal["programs", "requests", "favours"]
"""Kinds of the demo's rows, besides sums with their carries."""


class SumsSource(Settings):
    """The demo's data, which a tiny model learns in minutes: sums, programs that print a sum, and requests.

    Rows have the columns `prompt`, `answer`, `messages`, `truth`, and `reward`, the labels of their judges: `math`,
    `code`, or `helpful safety` for a request. A sum also has a right and a wrong answer, `by_correctness`; a request
    its answers from best to worst, `by_helpfulness` and `by_safety`, and a `kind`, `harmful` or `harmless`.
    """

    type: Literal["sums"]
    """Selects this source."""
    size: int = Field(ge=1)
    """Number of rows to draw."""
    digits: int = Field(default=2, ge=1, le=6)
    """Digits of each summand."""
    shares: dict[SumsShare, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict[SumsShare, float])
    """Shares of all rows. `programs` ask for a Python program that prints the sum. `requests` ask for a favour
    (`lend 3 pens`) or for harm, which is to be refused; `favours` only for favours. The other rows ask for the sum and
    its carries."""
    thoughts: float | None = Field(default=None, ge=0, le=1)
    """Answer after a chain of thought between <think> and </think>, as DeepSeek-R1 does; the number is the share of its
    steps in the question's language, English or Chinese (column `language`). `reward` also names `think_format` and
    `language`, and for a request either `helpful` or, for harm, `safety`. None writes no thoughts."""
    seed: int = 0
    """Seed of the draw."""
    split: Literal["train", "held_out"] = "train"
    """One of two disjoint sets: a hash of the problem's text holds out one in ten."""

    @model_validator(mode="after")
    def _whole(self) -> "SumsSource":
        if sum(self.shares.values()) > 1:
            raise ValueError(f"shares={self.shares} are more than all rows; lower one")
        if self.thoughts is not None and self.shares.get("programs"):
            raise ValueError("thoughts: programs have none; remove shares.programs")
        return self


class DatasetSource(Settings):
    """Rows of data sets on disk, in the format of `datasets`, such as the stages `preferences` and `sample` write."""

    type: Literal["dataset"]
    """Selects this source."""
    paths: list[str] = Field(min_length=1)
    """Folders written by `DatasetDict.save_to_disk`, concatenated; `stage:NAME` takes an earlier stage's."""
    split: str = "train"
    """Split to read. Our stages write `train` and, with `held_out` above 0, `held_out`."""


Source = Annotated[FileSource | HubSource | GymSource | SumsSource | DatasetSource, Field(discriminator="type")]
SOURCE_TYPES: tuple[type[Settings], ...] = get_args(get_args(Source)[0])


class SharedSource(Settings):
    """A source of a mixture."""

    source: Source
    """Source of the rows."""
    share: float = Field(gt=0, lt=1)
    """Share of the mixture's rows."""


class MixtureSource(Settings):
    """Rows of several sources by share. The source that is scarcest for its share is taken whole; of the others a part
    is drawn by the seed, so that the mixture is the same at every start."""

    type: Literal["mixture"]
    """Selects this source."""
    sources: dict[str, SharedSource] = Field(min_length=2)
    """Sources by name; their shares add up to 1."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draw."""

    @model_validator(mode="after")
    def _whole(self) -> "MixtureSource":
        shares = {name: part.share for name, part in self.sources.items()}
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares={shares} add up to {sum(shares.values()):g}; change them to add up to 1")
        return self


class ConversationData(Settings):
    """Conversations for supervised training."""

    source: Annotated[Source | MixtureSource, Field(discriminator="type")]
    """Source of the rows."""
    messages: str = "messages"
    """Column with the conversation: a list of {role, content}, or ShareGPT's {from, value}; see docs/sft.md."""
    prompt: str | None = None
    """Column with the user's text, for rows of one prompt and one answer. Set together with `answer`."""
    answer: str | None = None
    """Column with the assistant's text. Set together with `prompt`."""
    tools: str | None = "tools"
    """Column with the definitions of the tools that the assistant may call, if the rows have it. None reads none."""
    reasoning: Literal["train", "template", "drop"] = "train"
    """Use of the assistant's reasoning, in a key of its own or between <think> and </think>. `train`: learned; a row
    whose reasoning the chat template drops is a bad row. `template`: learned where the template renders it; many
    templates render only the last answer's. `drop`: left out."""
    max_length: int = Field(default=1024, ge=8)
    """Longest conversation in tokens. A longer one is a bad row; it is never truncated."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of bad rows, which are reported and left out; with more the run stops."""

    @model_validator(mode="after")
    def _one_form(self) -> "ConversationData":
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("'prompt' and 'answer' go together: set both or neither")
        return self


class PromptData(Settings):
    """Prompts, each with the truth that its completions are judged by."""

    source: Source
    """Source of the rows."""
    prompt: str = "prompt"
    """Column with the prompt: text, or a list of {role, content}."""
    truth: str | None = "truth"
    """Column with the truth that the reward compares against. None for rewards that need only the completion."""
    reward: str | None = None
    """Labels of the rewards that judge these rows, separated by blanks, or `column:NAME` for a column of labels. None:
    every configured reward judges them."""
    system: str | None = None
    """System message put before every prompt. None adds none."""
    max_prompt_length: int = Field(default=512, ge=1)
    """Longest prompt in tokens. A longer one is a bad row; it is never truncated. Unset, a stage that
    samples lowers it to what `rollout.max_model_len` leaves beside a completion."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of bad rows, which are reported and left out; with more the run stops."""


ComparisonColumn = Literal[
    "prompt", "chosen", "rejected", "chosen_score", "rejected_score", "answer", "answers", "score", "domain"
]
_COLUMNS_OF_FORM: dict[str, tuple[ComparisonColumn, ...]] = {
    "comparison": (),
    "pair": ("prompt", "chosen", "rejected", "chosen_score", "rejected_score", "domain"),
    "dialogue": ("chosen", "rejected", "domain"),
    "scored": ("prompt", "answer", "score", "domain"),
    "ranking": ("prompt", "answers", "domain"),
}


class ComparisonData(Settings):
    """Comparisons of answers to one prompt, for reward models."""

    source: Source
    """Source of the rows."""
    form: Literal["comparison", "pair", "dialogue", "scored", "ranking"] = "comparison"
    """Format of a row. `comparison`: as the stage `preferences` writes it (`messages`, `answers` from best to worst,
    `scores` or null, `source`, `domain`). `pair`: a prompt, a chosen and a rejected answer, each text or messages,
    with an optional score each; or, without a prompt, two conversations that differ in the last answer. `dialogue`:
    HH-RLHF's, two texts of turns that begin with "Human:" and "Assistant:" and differ in the last one. `scored`: a
    prompt, one answer and a number; rows of the same prompt are compared with each other. `ranking`: a prompt and a
    list of answers from best to worst."""
    columns: dict[ComparisonColumn, str] = Field(default_factory=dict[ComparisonColumn, str])
    """Names of the columns that are called otherwise in the data. `domain` and the scores of a pair are optional."""
    domains: list[str] = Field(default_factory=list[str])
    """Domains to read. Empty reads all."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Use of the chain of thought before `</think>` in an answer. `drop` leaves it out, for a reward model that reads
    the final answer alone (DeepSeek-R1's helpful one); its reward then needs the same `args.reasoning`."""
    max_length: int = Field(default=1024, ge=8)
    """Longest prompt with answer, in tokens. A longer one is a bad row; it is never truncated."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Largest share of bad rows, which are reported and left out; with more the run stops."""

    @model_validator(mode="after")
    def _used_columns(self) -> "ComparisonData":
        used = _COLUMNS_OF_FORM[self.form]
        for column in self.columns:
            if column not in used:
                names = ", ".join(used) or "none, its names are fixed"
                raise ValueError(
                    f"columns.{column} has no effect with form='{self.form}' (which has {names}); remove it"
                )
        return self
