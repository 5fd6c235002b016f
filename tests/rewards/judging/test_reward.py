"""The judge behind an address: whatever it answers, or doesn't, a score is only what it gave as one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rewards.judging.endpoint as endpoint
from configs.rewards import RewardPoolConfig, RewardSpec
from rewards.judging.reward import JudgeReward
from rewards.plugins.build import build_reward
from rewards.plugins.names import absolute
from rewards.pool.guard import Guard, inspect, unjudgeable
from rewards.types import Status, Task, Verdict
from tests.rewards.judging.server import RUBRIC, Judge, judge_server

TASK = Task("what is it?", "gold", row="rows:1")
LIMIT = 20.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server() as server:
        yield server


def spec(server: Judge, **args: Any) -> RewardSpec:
    settings: dict[str, Any] = {"url": server.url, "model": "m", "rubric": RUBRIC, "seconds": LIMIT}
    return RewardSpec(name="judge", args=settings | args)


def judge(server: Judge, *completions: str, **args: Any) -> list[Verdict]:
    with Guard([spec(server, **args)], timeout_seconds=5, memory_gib=None) as guard:
        return guard.judge("judge", TASK, completions)


def test_a_group_is_asked_at_once_and_each_gets_its_own_score(server: Judge) -> None:
    completions = [f"slowly I say [[{n}]]" for n in range(1, 9)]
    verdicts = judge(server, *completions, params={"temperature": 0, "max_tokens": 64})
    assert [verdict.score for verdict in verdicts] == [float(n) for n in range(1, 9)]
    assert "I say [[3]]" in verdicts[2].detail
    assert server.most_open > 1 and set(server.asked.values()) == {1}
    body = next(body for body in server.bodies if "[[3]]" in body["messages"][0]["content"])
    question = RUBRIC.format(prompt="what is it?", completion="slowly I say [[3]]")
    assert body == {
        "model": "m", "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": question}],
    }  # fmt: skip


def test_no_more_questions_are_open_than_allowed(server: Judge) -> None:
    verdicts = judge(server, *(f"slowly [[{n}]]" for n in range(1, 7)), connections=2)
    assert all(verdict.status is Status.OK for verdict in verdicts) and server.most_open == 2


@pytest.mark.parametrize("trouble", ["status 429", "status 500", "status 503", "drop now"])
def test_what_may_pass_is_asked_again(server: Judge, trouble: str) -> None:
    [verdict] = judge(server, trouble)
    assert verdict.score in (4.0, 5.0) and server.asked[trouble] == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("say it is good", "no marks"),
        ("say [[7]] or [[8]]", "2 marks"),
        ("say [[70]]", "70 is not between 1 and 10"),
        ("raw <html>", "no chat completion: '<html>'"),
        ('raw {"choices": []}', "no chat completion"),
        ('raw {"choices": [{"message": {"content": null}, "finish_reason": "length"}]}', "ended by 'length'"),
        ('raw {"choices": [{"message": {"content": "[[3]] or"}, "finish_reason": "length"}]}', "cut short"),
    ],
)
def test_garbage_is_asked_for_again_and_never_a_score(server: Judge, answer: str, message: str) -> None:
    verdicts = judge(server, answer, "say [[6]]")
    assert verdicts[1].score == 6.0
    assert verdicts[0].status is Status.INFRA_ERROR and verdicts[0].score is None
    assert "no score in 3 answers" in verdicts[0].detail and message in verdicts[0].detail
    assert server.asked[answer] == 6  # the guard asks for a failed verdict once more


def test_an_answer_that_becomes_a_score_counts(server: Judge) -> None:
    assert judge(server, "nth good|better|[[9]]")[0].score == 9.0


def test_a_refusal_is_not_asked_again_at_once(server: Judge) -> None:
    [verdict] = judge(server, "always 401")
    assert verdict.status is Status.INFRA_ERROR and "refused: HTTP 401" in verdict.detail
    assert server.asked["always 401"] == 2  # once more by the guard


def test_an_endpoint_that_fails_for_good_is_told_in_time(server: Judge) -> None:
    [verdict] = judge(server, "always 500", seconds=2.0)
    assert verdict.status is Status.INFRA_ERROR and "no time left: HTTP 500" in verdict.detail


def test_nobody_there(server: Judge) -> None:
    [verdict] = judge(server, "say [[7]]", url="http://127.0.0.1:9/v1", seconds=1.0)
    assert verdict.status is Status.INFRA_ERROR and "ConnectError" in verdict.detail


def test_an_endpoint_that_hangs_times_out_alone_and_no_group_waits_for_each(server: Judge) -> None:
    hanging = [f"hang {n}" for n in range(6)]
    verdicts = judge(server, *hanging, "say [[7]]", seconds=2.0)
    assert server.most_open >= 6  # all of them wait at the same time
    assert [verdict.status for verdict in verdicts] == [Status.TIMEOUT] * 6 + [Status.OK]
    assert "no verdict within 2 s" in verdicts[0].detail


def test_votes_are_drawn_apart_and_averaged(server: Judge) -> None:
    [verdict] = judge(server, "nth [[4]]|[[6]]|[[8]]", votes=3, params={"temperature": 1.0})
    assert verdict.score == 6.0


LISTWISE = RUBRIC.replace("{completion}", "{answers}")


def test_a_group_is_compared_in_both_orders(server: Judge) -> None:
    """The judge favours the first place by a point. In two votes, one the other backwards, each of two answers has it
    once: 3.5 and 8.5. In one vote only one of them has it."""
    answers = ["worth 3", "worth 8"]
    fair = judge(server, *answers, "worth 3", rubric=LISTWISE, compare=2, votes=2)
    assert [verdict.score for verdict in fair] == [3.5, 8.5, 3.5] and len(server.bodies) == 2  # equal ones stand once
    scores = [verdict.score for verdict in judge(server, *answers, rubric=LISTWISE, compare=2)]
    assert scores in ([4.0, 8.0], [3.0, 9.0])


def test_a_group_that_fails_is_judged_anew_as_a_whole(server: Judge) -> None:
    """The third answer makes the verdict one score short. Nothing is left of the group, and no answer is judged by
    itself, which would be another reward."""
    verdicts = judge(server, "worth 3", "worth 8", "worthless", rubric=LISTWISE, compare=3)
    assert [verdict.status for verdict in verdicts] == [Status.INFRA_ERROR] * 3
    assert "2 scores for 3 answers" in verdicts[0].detail and len(server.bodies) == 6  # three tries, twice
    assert all("[Answer 3]" in body["messages"][0]["content"] for body in server.bodies)
    [alone] = judge(server, "worth 3", rubric=LISTWISE, compare=3)
    assert alone.status is Status.ABSTAIN and alone.outcome == "alone"


def test_the_key_goes_to_the_endpoint_and_nowhere_else(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    good, bad = judge(server, "say [[7]]", "always 401", api_key_env="JUDGE_KEY")
    assert good.score == 7.0 and set(server.keys) == {"Bearer sk-secret"}
    assert "sk-secret" not in bad.detail and "Bearer ***" in bad.detail
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="api_key_env='JUDGE_KEY'"):
        judge(server, "say [[7]]", api_key_env="JUDGE_KEY")
    assert inspect([spec(server, api_key_env="JUDGE_KEY")], RewardPoolConfig())  # the workers may have it all the same


def test_what_was_answered_is_not_asked_again(server: Judge, tmp_path: Path) -> None:
    where = {"cache": str(tmp_path / "cache")}
    completions = ["say [[7]]", "say [[2]]", "say nothing"]
    first = judge(server, *completions, **where)
    asked = server.asked.copy()
    second = judge(server, *completions, **where)
    assert [verdict.score for verdict in first] == [verdict.score for verdict in second] == [7.0, 2.0, None]
    assert [server.asked[text] - asked[text] for text in completions] == [0, 0, 6]  # garbage is not kept
    for change in (
        {"model": "n"}, {"params": {"temperature": 0.5}}, {"rubric": RUBRIC + " Be strict."}, {"cache": None},
    ):  # fmt: skip
        asked = server.asked.copy()
        judge(server, "say [[7]]", **where | change)
        assert server.asked["say [[7]]"] - asked["say [[7]]"] == 1, change
    assert judge(server, "say [[7]]", **where, lowest=8.0)[0].status is Status.INFRA_ERROR  # a score by other terms


def test_each_vote_is_kept(server: Judge, tmp_path: Path) -> None:
    where = {"cache": str(tmp_path), "params": {"temperature": 1.0}}
    assert judge(server, "nth [[4]]|[[6]]|[[8]]", votes=2, **where)[0].score == 5.0
    assert judge(server, "nth [[4]]|[[6]]|[[8]]", votes=3, **where)[0].score == 6.0
    assert server.asked.total() == 3


def test_tasks_without_a_truth_the_rubric_shows_are_refused_before_the_run(server: Judge) -> None:
    specs = [spec(server, rubric="{truth} {completion} [[n]]")]
    problems = unjudgeable(specs, RewardPoolConfig(), [TASK, Task("q", None)])
    assert problems[0] is None and problems[1] is not None and "prompts.truth" in problems[1]
    assert not server.bodies


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"url": "judge:8000"}, "url='judge:8000'"),
        ({"url": "http://user:pass@judge/v1"}, "api_key_env"),
        ({"params": {"messages": []}}, r"params\.messages"),
        ({"params": {"temperature": 0}, "votes": 2}, r"votes=2 .*params\.temperature=0"),
        ({"votes": 0}, "votes"),
        ({"modell": "m"}, "did you mean 'model'"),
    ],
)
def test_wrong_arguments_are_refused(args: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"url": "http://judge/v1", "model": "m", "rubric": RUBRIC}
    with pytest.raises(ValueError, match=message):
        build_reward(RewardSpec(name="judge", args=settings | args))


def test_paths_are_whole_where_they_cross_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    args = {"url": "http://judge/v1", "model": "m", "rubric_file": "rubric.txt", "cache": "answers"}
    moved = absolute(RewardSpec(name="judge", label="mine", args=args))
    assert moved.label == "mine"
    assert moved.args == args | {"rubric_file": str(tmp_path / "rubric.txt"), "cache": str(tmp_path / "answers")}


def test_waits_grow_and_heed_the_endpoint(server: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    waits: list[float] = []

    async def no_wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(endpoint.asyncio, "sleep", no_wait)
    reward = JudgeReward(url=server.url, model="m", rubric=RUBRIC, seconds=60)

    async def ask(completion: str) -> Verdict:
        return await reward.score(TASK, completion)

    with asyncio.Runner() as runner:
        assert runner.run(ask("nth [[3]]")).score == 3.0 and waits == []
        assert runner.run(ask("status 429")).score == 4.0
        assert len(waits) == 1 and 0.25 <= waits[0] <= 0.5
