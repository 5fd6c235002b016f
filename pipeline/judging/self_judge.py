"""A language model of the recipe as its own judge: self-rewarding (DeepSeek-V3, arXiv:2412.19437, section 5.4.2).

The paper takes the votes of the model itself on open-ended questions as feedback. Here a checkpoint, such as the
reference of the stage, is asked with a rubric by an engine of the judging process.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from configs.sampling import SamplingConfig
from pipeline.judging.checkpoint import CheckpointJudge
from rewards.judging.rubric import TRIES, NoScore, Rubric, Vote, averaged, excerpt
from rewards.types import Status, Task, Verdict
from rollout.types import Completion

if TYPE_CHECKING:
    from pipeline.data.chat import ChatFormat
    from rollout.engine import RolloutEngine


class SelfJudge(Rubric, CheckpointJudge):
    """The score that a language model of ours gives by a rubric: its votes' mean, as it stands.

    An answer that is no score is drawn again, TRIES times in all; then there is no verdict. What spells a special token
    is not judged, since it could forge the judge's own words.
    """

    temperature: float = Field(default=1.0, ge=0)
    """Of the judge's answers; 0 is greedy, for one vote."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer of the judge in tokens."""
    seed: int = Field(default=0, ge=0)
    """Of the draws."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache of one worker in GiB."""

    @model_validator(mode="after")
    def _speaks(self) -> "SelfJudge":
        architectures = [] if self.promised else self.described.get("architectures") or []
        if not self.promised and not any(name.endswith("ForCausalLM") for name in architectures):
            raise ValueError(f"path='{self.path}' is no language model: {architectures}")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"votes={self.votes} at temperature=0 are all the same; raise it or ask once")
        return self

    def setup(self) -> None:
        """Load the model."""
        self.claim_threads()
        _ = self._engine

    def check(self, task: Task) -> None:
        """Raises ValueError where the rubric wants a truth the task lacks, or the question can't be asked."""
        super().check(task)
        question = self._question_ids(task, "")
        if isinstance(question, str):
            raise ValueError(question)

    def score_batch(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Verdict]:
        """The verdicts; see the class. An abstention where the question can't be asked, as `check` says."""
        questions = [self._question_ids(task, text) for task, text in zip(tasks, completions, strict=True)]
        verdicts = iter(self._judged([question for question in questions if isinstance(question, list)]))
        return [
            next(verdicts) if isinstance(question, list) else Verdict(None, Status.ABSTAIN, question)
            for question in questions
        ]

    def _judged(self, questions: list[list[int]]) -> list[Verdict]:
        votes: list[list[Vote]] = [[] for _ in questions]
        troubles = [""] * len(questions)
        missing = [index for index in range(len(questions)) for _ in range(self.votes)]
        tries = TRIES if self.temperature else 1  # a greedy judge would say the same again
        for attempt in range(tries):
            again: list[int] = []
            answers = self._answers([questions[index] for index in missing], attempt) if missing else []
            for index, answer in zip(missing, answers, strict=True):
                try:
                    if answer.finish_reason == "length":  # a number in an unfinished thought is no score
                        raise NoScore(f"an answer cut short; raise max_tokens: {excerpt(answer.text)}")
                    votes[index].append((self.read(answer.text), answer.text))
                except NoScore as error:
                    troubles[index] = str(error)
                    again.append(index)
            missing = again
        return [
            averaged(given)
            if len(given) == self.votes
            else Verdict(None, Status.INFRA_ERROR, f"no score in {tries} answers; the last: {trouble}")
            for given, trouble in zip(votes, troubles, strict=True)
        ]

    def _question_ids(self, task: Task, completion: str) -> list[int] | str:
        """Token ids of the question, or why it can't be asked."""
        from pipeline.data.rows import BadRowError

        try:
            token_ids = self._chat.prompt_ids(self._chat.check(self.question(task, completion), last_role="user"))
        except BadRowError as error:
            return str(error)
        if len(token_ids) + self.max_tokens > self.longest:
            return (
                f"{len(token_ids)} tokens and max_tokens={self.max_tokens} for the answer, max_length is {self.longest}"
            )
        return token_ids

    def _answers(self, questions: list[list[int]], attempt: int) -> list[Completion]:
        """What the judge says to each."""
        sampling = SamplingConfig(max_tokens=self.max_tokens, temperature=self.temperature)
        groups = self._engine.generate(questions, sampling, 1, self.seed + attempt)
        return [group.completions[0] for group in sorted(groups, key=lambda group: group.index)]

    @cached_property
    def _chat(self) -> "ChatFormat":
        from pipeline.data.chat import ChatFormat

        return ChatFormat(self.tokenizer)

    @cached_property
    def _engine(self) -> "RolloutEngine":
        from rollout.engine import RolloutEngine

        ends = self._chat.end_ids()
        return RolloutEngine(
            self.folder, self.engine_config(self.kv_cache_gib), self.dtype, self.seed, stop_token_ids=ends
        )
