"""Figures of a judge: agreement with a known order, alone and by votes, position bias and calibration.

Answers of a comparison stand by their index, the best one first, wherever a verdict saw them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from configs.evaluation import VerdictSuite
from configs.sampling import SamplingConfig
from pipeline.data.chat import ChatFormat
from pipeline.data.comparisons import Comparison, read_comparisons
from pipeline.data.judging import judged_task, slates
from pipeline.data.rows import BadRowError, BadRows
from pipeline.evaluation.generation import complete, rates
from pipeline.evaluation.suites import CompletionRecord, Items, Session, SuiteResult, suite_result
from rewards.judging.rubric import NoScore, Rubric, read_verdict
from rewards.judging.votes import best_answer, draw_ballots, voted_scores
from rewards.types import Status, Task
from rollout.types import StoredCompletion

_GREEDY = 2
"""Greedy verdicts on a comparison: in an order, and in the same backwards."""
_BINS = 10


@dataclass(frozen=True, slots=True)
class JudgedComparison:
    """A comparison with the prompts of its verdicts: the greedy ones, then the votes.

    ballots: the answers that each prompt shows, by index, in order.
    """

    row: str
    answers: list[str]
    ballots: list[list[int]]
    questions: list[list[dict[str, str]]]
    prompt_ids: list[list[int]]


@dataclass(frozen=True, slots=True)
class Opinion:
    """One verdict: the answers in the order that it saw, their scores (None where they can't be read), and the score of
    the meta reward model, if there is one."""

    shown: list[int]
    scores: list[float] | None
    meta_score: float = float("-inf")

    @property
    def best(self) -> int | None:
        """The answer that scores strictly highest; None for a tie, and where no scores can be read."""
        place = best_answer(self.scores) if self.scores else None
        return None if place is None else self.shown[place]


def load_verdicts(
    suite: VerdictSuite, tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[list[JudgedComparison], BadRows]:
    """Read the comparisons of the suite and render the prompts of all verdicts on them.

    Raises ValueError for an unreadable source or too many bad rows.
    """
    chat, bad_rows, repeats = ChatFormat(tokenizer), BadRows(), Counter[str]()
    rubric = Rubric.model_validate(suite.judge.model_dump())
    comparisons: list[JudgedComparison] = []
    for comparison in read_comparisons(suite.data, bad_rows):
        try:
            judged = _judged(comparison, rubric, chat, seed)
            longest = max(map(len, judged.prompt_ids))
            if longest > suite.max_prompt_length:
                raise BadRowError("longer than max_prompt_length", f"{longest} tokens > {suite.max_prompt_length}")
        except BadRowError as error:
            bad_rows.add(comparison.row, error)
        else:
            repeats[judged.row] += 1
            number = repeats[judged.row]
            comparisons.append(judged if number == 1 else replace(judged, row=f"{judged.row}#{number}"))
    bad_rows.check(suite.max_bad_share)
    return comparisons, bad_rows


def run_verdicts(suite: VerdictSuite, comparisons: Sequence[JudgedComparison], session: Session) -> SuiteResult:
    """Write two greedy verdicts and the votes on every comparison. See `verdict_figures`.

    Raises the exceptions of the handles (RewardsUnavailable for a broken meta reward model).
    """
    greedy = _write(comparisons, slice(_GREEDY), session.greedy, session, "verdicts, greedy")
    votes = _write(comparisons, slice(_GREEDY, None), session.sampling, session, "verdicts, sampled")
    meta_scores = _meta_scores(suite, comparisons, votes, session)
    opinions: list[list[Opinion]] = []
    records: list[CompletionRecord] = []
    for index, comparison in enumerate(comparisons):
        opinions.append([])
        for place, completion in enumerate(greedy[index] + votes[index]):
            problem, scores = "", None
            try:
                scores = read_verdict(completion.text, len(comparison.ballots[place]), suite.judge)
            except NoScore as error:
                problem = str(error)
            if completion.finish_reason == "length":
                problem, scores = "cut short", None
            meta_score = meta_scores.get((index, place - _GREEDY))
            opinion = Opinion(comparison.ballots[place], scores, float("-inf") if meta_score is None else meta_score)
            opinions[-1].append(opinion)
            records.append(
                CompletionRecord(
                    index=index,
                    row=comparison.row,
                    prompt=comparison.questions[place][-1]["content"],
                    truth={"best": comparison.ballots[place].index(0) + 1},
                    completion=completion.text,
                    mode="greedy" if place < _GREEDY else "sampled",
                    score=None if scores is None else float(opinion.best == 0),
                    status=Status.OK if scores is not None else Status.ABSTAIN,
                    detail=problem,
                    num_tokens=completion.num_tokens,
                    truncated=completion.finish_reason == "length",
                    parts={"meta": meta_score} if suite.meta and place >= _GREEDY else {},
                )
            )
    items, figures = verdict_figures({c.row: o for c, o in zip(comparisons, opinions, strict=True)}, suite.keep_votes)
    shares = [name for name in items if name != "agreement_sampled"]
    return suite_result(items, shares, figures | rates(records), records)


def verdict_figures(opinions: dict[str, list[Opinion]], keep: int | None) -> tuple[dict[str, Items], dict[str, float]]:
    """Return the items and the other figures of verdicts by comparison: the greedy ones first, then the votes.

    Items: `agreement`, 1 for a verdict that scores the best answer strictly highest, the mean of the two greedy ones;
    `position_bias`, 1 where their best answers differ, of comparisons with both readable; `agreement_sampled`, the mean
    over the votes; `agreement_voted` by their mean scores; `agreement_meta` by the `keep` best of them by the meta
    reward model. Figures: `first_preferred`, the share of greedy verdicts with a best answer that prefer the first
    place, 1/n for an unbiased judge of n answers; `calibration_error` (see `vote_calibration`).
    """
    names = ["agreement", "position_bias", "agreement_sampled", "agreement_voted"] + ["agreement_meta"] * bool(keep)
    items: dict[str, Items] = {name: {} for name in names}
    firsts: list[bool] = []
    counts: list[tuple[float, bool]] = []
    for row, of_row in opinions.items():
        greedy, votes = of_row[:_GREEDY], of_row[_GREEDY:]
        items["agreement"][row] = _share([opinion.best == 0 for opinion in greedy])
        if all(opinion.scores for opinion in greedy):
            items["position_bias"][row] = float(greedy[0].best != greedy[1].best)
        firsts += [opinion.best == opinion.shown[0] for opinion in greedy if opinion.best is not None]
        items["agreement_sampled"][row] = _share([opinion.best == 0 for opinion in votes])
        winner, share = count_votes(votes)
        items["agreement_voted"][row] = float(winner == 0)
        if winner is not None:
            counts.append((share, winner == 0))
        if keep:
            items["agreement_meta"][row] = float(count_votes(votes, keep)[0] == 0)
    figures = {"first_preferred": _share(firsts)} if firsts else {}
    return items, figures | ({"calibration_error": vote_calibration(counts)} if counts else {})


def count_votes(votes: Sequence[Opinion], keep: int | None = None) -> tuple[int | None, float]:
    """Return the answer with the strictly highest mean score, and the share of the votes whose best it is.

    Unreadable votes do not count. keep: of the others only so many count, by their meta scores. The answer is None for
    a tie and without votes.
    """
    read = [(vote.shown, vote.scores, vote.best, vote.meta_score) for vote in votes if vote.scores is not None]
    counted = sorted(read, key=lambda vote: -vote[3])[:keep]
    if not counted:
        return None, 0.0
    winner = best_answer(voted_scores([vote[0] for vote in counted], [vote[1] for vote in counted]))
    return winner, _share([best == winner for *_, best, _ in counted])


def vote_calibration(counts: Sequence[tuple[float, bool]]) -> float:
    """Return the expected calibration error of vote shares: the mean of |share - agreement| of ten bins of the share.

    counts: for each comparison the share of the votes for its winner, and whether the winner is right.
    """
    share_N, right_N = np.array([share for share, _ in counts]), np.array([right for _, right in counts], float)
    bin_N = np.minimum(share_N * _BINS, _BINS - 1).astype(int)
    gaps = [abs(share_N[bin_N == b].mean() - right_N[bin_N == b].mean()) * (bin_N == b).sum() for b in set(bin_N)]
    return float(sum(gaps) / len(counts))


def _judged(comparison: Comparison, rubric: Rubric, chat: ChatFormat, seed: int) -> JudgedComparison:
    task, answers = judged_task(comparison, rubric), slates(comparison, rubric.compare, seed)[0]
    size, key = len(answers), f"{seed}/{comparison.row}/{answers}"
    ballots = draw_ballots(size, size, _GREEDY, key) + draw_ballots(size, size, rubric.votes, f"{key}/votes")
    questions = [rubric.question(task, *(answers[index] for index in ballot)) for ballot in ballots]
    prompt_ids = [chat.prompt_ids(chat.check(question, last_role="user")) for question in questions]
    return JudgedComparison(comparison.row, answers, ballots, questions, prompt_ids)


def _write(
    comparisons: Sequence[JudgedComparison], part: slice, sampling: SamplingConfig, session: Session, title: str
) -> list[list[StoredCompletion]]:
    """Generate a verdict on each prompt of `part`, by comparison."""
    prompt_ids = [ids for comparison in comparisons for ids in comparison.prompt_ids[part]]
    groups = complete(prompt_ids, session.rollout, sampling, 1, session.seed, title)
    verdicts = iter(group.completions[0] for group in groups)
    return [[next(verdicts) for _ in comparison.prompt_ids[part]] for comparison in comparisons]


def _meta_scores(
    suite: VerdictSuite,
    comparisons: Sequence[JudgedComparison],
    votes: Sequence[Sequence[StoredCompletion]],
    session: Session,
) -> dict[tuple[int, int], float]:
    """Score the votes by the suite's meta reward model, if it has one: by comparison and vote, where it could."""
    if suite.meta is None or session.rewards is None:
        return {}
    keys = [(index, vote) for index, of_comparison in enumerate(votes) for vote in range(len(of_comparison))]
    for number, (index, vote) in enumerate(keys):
        messages = comparisons[index].questions[_GREEDY + vote]
        task = Task(messages[-1]["content"], None, suite.meta.label, comparisons[index].row, messages=messages)
        session.rewards.submit(number, task, [votes[index][vote].text])
    verdicts = session.rewards.gather()
    scores = {key: verdicts[number][0][suite.meta.label].score for number, key in enumerate(keys)}
    return {key: score for key, score in scores.items() if score is not None}


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
