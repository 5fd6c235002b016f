"""A language model of the recipe as judge: a generative reward model (SPCT, arXiv:2504.02495), or the policy as its own
judge with rubrics (DeepSeek-V3, arXiv:2412.19437, section 5.4.2; DeepSeek-V3.2, arXiv:2512.02556).

A checkpoint, such as the stage's reference or a judge that was trained, answers a rubric in an engine of the judging
process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from configs.sampling import SamplingConfig
from pipeline.judging.checkpoint import CheckpointJudge
from pipeline.judging.reward_model import RewardModel
from rewards.judging.rubric import TRIES, NoScore, Rubric, Vote, excerpt, read_verdict
from rewards.judging.votes import ALONE, draw_ballots, tally
from rewards.plugins.names import JUDGE_CACHE_GIB
from rewards.types import Status, Task, Verdict
from rollout.types import Completion

if TYPE_CHECKING:
    from pipeline.data.chat import ChatFormat
    from rollout.engine import RolloutEngine

JudgeQuestion = tuple[list[dict[str, str]], list[int], int]
"""A judge's prompt as a conversation and as token ids, and the number of answers that it shows."""


@dataclass(frozen=True, slots=True)
class _Slate:
    """Completions of one task that are judged together: those that a prompt can show, by their index among all."""

    size: int
    problems: dict[int, str]
    """Reasons why a completion can't be shown, by its index."""
    ballots: list[list[int]]
    """Places among the shown ones, for each verdict."""
    questions: list[JudgeQuestion]

    def verdicts(self, shown: Sequence[Verdict]) -> list[Verdict]:
        """Put the verdicts on the shown completions between the abstentions from the others."""
        rest = iter(shown)
        return [
            Verdict(None, Status.ABSTAIN, self.problems[index]) if index in self.problems else next(rest)
            for index in range(self.size)
        ]


class SelfJudge(Rubric, CheckpointJudge):
    """Scores answers by the mean vote of a language model with a rubric, each by itself or the group compared.

    A vote without scores is sampled again, up to TRIES times; then there is no verdict. A completion that spells a
    special token is not judged, because it could forge the judge's turn.
    """

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of the judge; 0 is greedy, for votes that differ in the order of the answers alone."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest vote in tokens."""
    seed: int = Field(default=0, ge=0)
    """Seed of the votes and of the orders of the answers."""
    kv_cache_gib: float = Field(default=JUDGE_CACHE_GIB, gt=0)
    """KV cache of one worker in GiB."""
    meta: RewardModel | None = None
    """Meta reward model: a reward model of verdicts, which the judging process loads too. Of an answer's votes only the
    `keep_votes` that it scores highest count. None counts all."""
    keep_votes: int | None = Field(default=None, ge=1)
    """Votes that count. Set together with `meta`."""

    @model_validator(mode="after")
    def _can_vote(self) -> "SelfJudge":
        architectures = [] if self.promised else self.described.get("architectures") or []
        if not self.promised and not any(name.endswith("ForCausalLM") for name in architectures):
            raise ValueError(f"path='{self.path}' is no language model: {architectures}")
        if self.temperature == 0 and self.compare == 1 and self.votes > 1:
            raise ValueError(f"votes={self.votes} at temperature=0 are all the same; raise temperature or lower votes")
        if (self.meta is None) != (self.keep_votes is None):
            raise ValueError("'meta' and 'keep_votes' go together: set both or neither")
        if self.keep_votes is not None and self.keep_votes >= self.votes:
            raise ValueError(f"keep_votes={self.keep_votes} drops none of votes={self.votes}; lower it")
        return self

    def setup(self) -> None:
        """Load the models."""
        self.claim_threads()
        if self.meta is not None:
            self.meta.setup()
        _ = self._engine

    def check(self, task: Task) -> None:
        """Raise ValueError if the task lacks the truth or rubric that the rubric shows, or the judge's prompt is
        unusable."""
        super().check(task)
        question = self._question(task, [""] * self.compare)
        if isinstance(question, str):
            raise ValueError(question)

    def score_batch(self, tasks: Sequence[Task], completions: Sequence[str]) -> list[Verdict]:
        """Judge each completion by itself; one whose judge's prompt is unusable gets an abstention."""
        slates = [self._slate(task, [text]) for task, text in zip(tasks, completions, strict=True)]
        return [verdict for verdicts in self._judge(slates) for verdict in verdicts]

    def score_list(self, task: Task, completions: Sequence[str]) -> list[Verdict]:
        """Judge the completions of a group against each other; one that no prompt can show gets an abstention."""
        slate = self._slate(task, completions)
        if slate.size - len(slate.problems) == 1:
            return slate.verdicts([ALONE])
        return self._judge([slate])[0]

    def _slate(self, task: Task, completions: Sequence[str]) -> _Slate:
        alone = [self._question(task, [text]) for text in completions]
        problems = {index: question for index, question in enumerate(alone) if isinstance(question, str)}
        shown = [text for index, text in enumerate(completions) if index not in problems]
        key = f"{self.seed}/{self.text}/{shown}"
        ballots = draw_ballots(len(shown), self.compare, self.votes, key) if shown else []
        questions = [self._question(task, [shown[place] for place in ballot]) for ballot in ballots]
        good = [question for question in questions if not isinstance(question, str)]
        if len(good) < len(questions):  # together they are too long
            reason = next(question for question in questions if isinstance(question, str))
            return _Slate(len(completions), dict.fromkeys(range(len(completions)), reason) | problems, [], [])
        return _Slate(len(completions), problems, ballots, good)

    def _judge(self, slates: Sequence[_Slate]) -> list[list[Verdict]]:
        votes = self._votes([question for slate in slates for question in slate.questions])
        verdicts: list[list[Verdict]] = []
        for slate in slates:
            of_slate, votes = votes[: len(slate.questions)], votes[len(slate.questions) :]
            shown = slate.size - len(slate.problems)
            meta_scores = self._meta_scores(slate.questions, of_slate)
            counted = tally(shown, slate.ballots, of_slate, meta_scores, self.keep_votes) if shown else []
            verdicts.append(slate.verdicts(counted))
        return verdicts

    def _votes(self, questions: Sequence[JudgeQuestion]) -> list[Vote | str]:
        """Sample a vote on each question; the reason where none of the tries gives one."""
        votes: list[Vote | str] = [""] * len(questions)
        missing = list(range(len(questions)))
        tries = TRIES if self.temperature else 1  # greedy votes repeat
        for attempt in range(tries):
            failed: list[int] = []
            answers = self._answers([questions[index][1] for index in missing], attempt) if missing else []
            for index, answer in zip(missing, answers, strict=True):
                try:
                    if answer.finish_reason == "length":  # a number in an unfinished thought is no score
                        raise NoScore(f"an answer cut short; raise max_tokens: {excerpt(answer.text)}")
                    votes[index] = read_verdict(answer.text, questions[index][2], self), answer.text
                except NoScore as error:
                    votes[index] = f"no score in {tries} answers; the last: {error}"
                    failed.append(index)
            missing = failed
        return votes

    def _meta_scores(self, questions: Sequence[JudgeQuestion], votes: Sequence[Vote | str]) -> list[float] | None:
        """Score the votes by the meta reward model. One that it can't read is the last to be kept."""
        texts = [vote[1] for vote in votes if not isinstance(vote, str)]
        if self.meta is None or len(texts) < len(votes):
            return None
        tasks = [Task("", None, messages=messages) for messages, _, _ in questions]
        scores = self.meta.score_batch(tasks, texts)
        return [score if isinstance(score, float) else float("-inf") for score in scores]

    def _question(self, task: Task, completions: Sequence[str]) -> JudgeQuestion | str:
        """Return the judge's prompt, or why it is unusable."""
        from pipeline.data.rows import BadRowError

        messages = self.question(task, *completions)
        try:
            token_ids = self._chat.prompt_ids(self._chat.check(messages, last_role="user"))
        except BadRowError as error:
            return str(error)
        if len(token_ids) + self.max_tokens > self.longest:
            return (
                f"{len(token_ids)} tokens and max_tokens={self.max_tokens} for the answer, max_length is {self.longest}"
            )
        return messages, token_ids, len(completions)

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
            self.folder, self.engine_config(self.kv_cache_gib), self.precision, self.seed, stop_token_ids=ends
        )
