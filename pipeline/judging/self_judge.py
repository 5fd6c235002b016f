"""A language model of the recipe as judge: self-rewarding (DeepSeek-V3, arXiv:2412.19437, section 5.4.2).

In the paper, the votes of the model itself on open-ended questions are the feedback. Here a checkpoint, such as the
stage's reference, answers a rubric in an engine of the judging process.
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
    """Scores an answer by the mean vote of a language model with a rubric.

    A vote without a score is sampled again, up to TRIES times; then there is no verdict. A completion that spells a
    special token is not judged, because it could forge the judge's turn.
    """

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of the judge; 0 is greedy, for one vote."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest vote in tokens."""
    seed: int = Field(default=0, ge=0)
    """Seed of the votes."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """KV cache of one worker in GiB."""

    @model_validator(mode="after")
    def _can_vote(self) -> "SelfJudge":
        architectures = [] if self.promised else self.described.get("architectures") or []
        if not self.promised and not any(name.endswith("ForCausalLM") for name in architectures):
            raise ValueError(f"path='{self.path}' is no language model: {architectures}")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"votes={self.votes} at temperature=0 are all the same; raise temperature or set votes: 1")
        return self

    def setup(self) -> None:
        """Load the model."""
        self.claim_threads()
        _ = self._engine

    def check(self, task: Task) -> None:
        """Raise ValueError if the task lacks the truth in the rubric, or the judge's prompt is unusable."""
        super().check(task)
        question = self._question_ids(task, "")
        if isinstance(question, str):
            raise ValueError(question)

    def score_batch(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Verdict]:
        """Judge the completions; one whose judge's prompt is unusable gets an abstention."""
        questions = [self._question_ids(task, text) for task, text in zip(tasks, completions, strict=True)]
        verdicts = iter(self._verdicts([question for question in questions if isinstance(question, list)]))
        return [
            next(verdicts) if isinstance(question, list) else Verdict(None, Status.ABSTAIN, question)
            for question in questions
        ]

    def _verdicts(self, questions: list[list[int]]) -> list[Verdict]:
        votes: list[list[Vote]] = [[] for _ in questions]
        reasons = [""] * len(questions)
        missing = [index for index in range(len(questions)) for _ in range(self.votes)]
        tries = TRIES if self.temperature else 1  # greedy votes repeat
        for attempt in range(tries):
            failed: list[int] = []
            answers = self._answers([questions[index] for index in missing], attempt) if missing else []
            for index, answer in zip(missing, answers, strict=True):
                try:
                    if answer.finish_reason == "length":  # a number in an unfinished thought is no score
                        raise NoScore(f"an answer cut short; raise max_tokens: {excerpt(answer.text)}")
                    votes[index].append((self.read(answer.text), answer.text))
                except NoScore as error:
                    reasons[index] = str(error)
                    failed.append(index)
            missing = failed
        return [
            averaged(scores)
            if len(scores) == self.votes
            else Verdict(None, Status.INFRA_ERROR, f"no score in {tries} answers; the last: {reason}")
            for scores, reason in zip(votes, reasons, strict=True)
        ]

    def _question_ids(self, task: Task, completion: str) -> list[int] | str:
        """Return the judge's prompt, or why it is unusable."""
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
