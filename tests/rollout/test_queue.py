"""The queue that engines pull from, with engines that are functions: who samples what, and in which order."""

from collections.abc import Callable

import numpy as np
import pytest

from configs.sampling import SamplingConfig
from rollout.queue import CompletionKey, CompletionRequest, GenerationQueue, Progress
from rollout.types import Begun, Completion, Group, KeptTokens

SAMPLING = SamplingConfig(max_tokens=64)


def completion(request: CompletionRequest, version: int = 0) -> Completion:
    """A completion as every engine samples it: 1 to 32 tokens that only its seed and prompt decide."""
    seed = request.seed or 0
    token_ids = [(seed >> shift) % 251 for shift in range(1 + seed % 32)]
    return Completion(token_ids, [-1.0] * len(token_ids), "", "stop", version)


def run(queue: GenerationQueue, ticket: int, room: int, speeds: list[int]) -> tuple[list[Group], list[int]]:
    """Let engines decode `room` completions at once, each with so many tokens a turn; return the groups, and the number
    of completions of each engine."""
    left: list[dict[CompletionKey, tuple[int, Completion]]] = [{} for _ in speeds]
    counts, groups = [0] * len(speeds), list[Group]()
    for _ in range(10_000):
        for engine, speed in enumerate(speeds):
            for request in queue.take(engine, room - len(left[engine])):
                sampled = completion(request)
                left[engine][request.key] = (len(sampled.token_ids), sampled)
                counts[engine] += 1
            for key, (tokens, sampled) in list(left[engine].items()):
                left[engine][key] = (tokens - speed, sampled)
            done = [key for key, (tokens, _) in left[engine].items() if tokens <= 0]
            queue.receive(engine, Progress([(key, left[engine].pop(key)[1], None) for key in done], {}, room))
        more, is_last = queue.pop(ticket)
        groups += more
        if is_last:
            return sorted(groups, key=lambda group: group.index), counts
    raise AssertionError("a completion never came")


def prompts(count: int) -> list[list[int]]:
    return [[1, 3, *range(number % 7)] for number in range(count)]


def test_a_slow_engine_takes_less_and_the_completions_are_the_same() -> None:
    alone = GenerationQueue(num_engines=1)
    one, _ = run(alone, alone.add(prompts(64), SAMPLING, 8, seed=5), 16, [4])
    queue = GenerationQueue(num_engines=3)
    three, counts = run(queue, queue.add(prompts(64), SAMPLING, 8, seed=5), 16, [8, 4, 1])
    assert three == one
    assert counts[0] > 1.5 * counts[1] > 3 * counts[2] and sum(counts) == 512


def test_each_engine_gets_its_share_where_all_fits_at_once() -> None:
    queue = GenerationQueue(num_engines=2)
    queue.add(prompts(6), SAMPLING, 4, seed=0)
    shares = [{request.key.prompt for request in queue.take(engine, 100)} for engine in range(2)]
    assert len(shares[0]) == len(shares[1]) == 3, "whole groups, whose prompt is computed once"
    assert shares[0].isdisjoint(shares[1])
    queue.add(prompts(1), SAMPLING, 5, seed=0)
    lone = GenerationQueue(num_engines=2)
    lone.add(prompts(1), SAMPLING, 5, seed=0)
    assert [len(lone.take(engine, 100)) for engine in range(2)] == [3, 2], "a single group is shared"


def order(queue: GenerationQueue) -> list[int]:
    """Prompts in the order in which an engine with little room takes them."""
    return [request.key.prompt for _ in range(4) for request in queue.take(0, 1)]


def test_long_prompts_go_first_and_before_them_those_whose_answers_were_long() -> None:
    by_length = [[1] * 5, [1] * 9, [1] * 2, [1] * 7]
    queue = GenerationQueue(num_engines=1)
    first = queue.add(by_length, SAMPLING, 1, seed=0)
    assert order(queue) == [1, 3, 0, 2]
    lengths = {0: 3, 1: 2, 2: 50, 3: 4}
    finished = [
        (CompletionKey(first, place, 0), Completion([1] * count, [0.0] * count, "", "stop", 0), None)
        for place, count in lengths.items()
    ]
    queue.receive(0, Progress(finished, {}, 8))
    queue.pop(first)
    queue.add(by_length, SAMPLING, 1, seed=1)
    assert order(queue) == [2, 3, 0, 1]


@pytest.mark.parametrize("known", [True, False])
def test_a_lost_engine_biases_no_length(known: bool) -> None:
    """Whenever it is lost, the completions are those of an engine that lives, and what it had begun comes first."""

    def lengths(lose_after: int | None) -> list[int]:
        queue = GenerationQueue(num_engines=1)
        ticket = queue.add(prompts(8), SAMPLING, 4, seed=2)
        held = queue.take(0, 32)
        if lose_after is not None:
            done = [r for r in held if len(completion(r).token_ids) <= lose_after]
            queue.receive(0, Progress([(r.key, completion(r), None) for r in done], {}, 0))
            rest = {r.key: completion(r) for r in held if r not in done}
            begun = {
                key: Begun(c.token_ids[:lose_after], c.logprobs[:lose_after], ((0, 0),)) for key, c in rest.items()
            }
            queue.receive(0, Progress([], begun if known else {}, 0))
            queue.give_back(0)
            held = queue.take(0, 32)
            assert {r.key for r in held} == rest.keys()
            assert all((r.begun == begun[r.key]) if known else r.begun is None for r in held)
            assert queue.continued_tokens == (lose_after * len(rest) if known else 0)
            assert queue.restarted_completions == (0 if known else len(rest))
        queue.receive(0, Progress([(r.key, completion(r), None) for r in held], {}, 0))
        return [len(c.token_ids) for group in queue.pop(ticket)[0] for c in group.completions]

    assert sorted(lengths(5)) == sorted(lengths(20)) == sorted(lengths(None))


def test_tokens_of_further_reports_are_appended() -> None:
    queue = GenerationQueue(num_engines=1)
    queue.add(prompts(1), SAMPLING, 1, seed=0)
    [request] = queue.take(0, 1)
    queue.receive(0, Progress([], {request.key: Begun([4, 5], [-1.0, -2.0], ((0, 3),))}, 0))
    queue.receive(0, Progress([], {request.key: Begun([6], [-3.0], ((0, 3), (2, 4)))}, 0))
    queue.give_back(0)
    [again] = queue.take(0, 1)
    assert again.begun == Begun([4, 5, 6], [-1.0, -2.0, -3.0], ((0, 3), (2, 4)))
    whole = Begun([4], [-1.0], ((0, 3),))
    queue.give_back(0, {request.key: whole})
    assert queue.take(0, 1)[0].begun == whole, "an engine that was asked knows better"


def test_what_was_dropped_is_forgotten() -> None:
    queue = GenerationQueue(num_engines=1)
    first = queue.add(prompts(1), SAMPLING, 2, seed=0)
    second = queue.add(prompts(1), SAMPLING, 2, seed=1)
    taken = queue.take(0, 2)
    assert {request.key.ticket for request in taken} == {first}, "the oldest request is served first"
    assert queue.drop(first) == [0] and not queue.is_busy(0)
    queue.receive(0, Progress([(r.key, completion(r), None) for r in taken], {}, 0))
    assert {request.key.ticket for request in queue.take(0, 9)} == {second}


def test_the_version_of_every_token() -> None:
    plain: Callable[..., Completion] = lambda **more: Completion([1] * 4, [0.0] * 4, "", "stop", 2, **more)  # noqa: E731
    assert plain().columns().token_versions.tolist() == [2, 2, 2, 2]
    assert plain(updates=((1, 3), (3, 5))).columns().token_versions.tolist() == [2, 3, 3, 5]


def test_the_step_that_trains_next_is_served_first_and_evaluation_before_all() -> None:
    """While weights arrive, only requests of no step are served."""
    queue = GenerationQueue(num_engines=1)
    tickets = {step: queue.add(prompts(1), SAMPLING, 1, seed=0, step=step) for step in (4, 3, 5, 0)}
    again = queue.add(prompts(1), SAMPLING, 1, seed=0, step=3)  # a further round of dynamic sampling
    queue.holds_steps = True
    assert [request.key.ticket for request in queue.take(0, 9)] == [tickets[0]]
    queue.holds_steps = False
    served = [request.key.ticket for request in queue.take(0, 9)]
    assert served == [tickets[3], again, tickets[4], tickets[5]]
    queue.give_back(0, {CompletionKey(tickets[5], 0, 0): Begun([4], [-1.0], ((0, 3),))})
    assert [request.key.ticket for request in queue.take(0, 2)] == [tickets[0], tickets[3]], "whatever was begun"


def test_kept_tokens_are_continued_with_their_completion() -> None:
    kept = KeptTokens(np.array([4, 9, 5, 6, 7], np.int32), np.array([2, 1, 2], np.int32))
    begun = Begun([4, 5, 6], [-1.0, -2.0, -3.0], ((0, 3),), kept)
    first, rest = Begun([4], [-1.0], ((0, 3),), KeptTokens(kept.token_ids[:2], kept.counts[:1])), begun.since(1)
    assert rest.token_ids == [5, 6] and rest.kept_tokens is not None
    assert rest.kept_tokens.padded().tolist() == [[5, -1], [6, 7]]
    whole = first.joined(rest)
    assert whole.token_ids == begun.token_ids and whole.kept_tokens is not None
    assert whole.kept_tokens.padded().tolist() == [[4, 9], [5, -1], [6, 7]]
