"""Engines that pull completions from the queue, and the groups that come of it.

A report of an engine carries what is finished. An engine that was lost is replaced while its caller waits for groups.

Requests of training steps to come are sampled while the caller waits for something else. Weights then arrive between
two reports: every engine gives back what it holds, with its tokens, and continues it with the new weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from configs.sampling import SamplingConfig
from rollout.actors import EngineActors, EngineLost, RolloutError
from rollout.queue import GenerationQueue, Progress
from rollout.requests import refuse_equal_completions, refuse_prompts
from rollout.types import StoredCompletion, StoredGroup

SLICE_SECONDS = 0.25
"""Seconds after which an engine reports what is finished and takes more."""
REPORT_SECONDS = 10.0
"""Seconds after which it also reports the tokens of what is not finished, which would be lost with it."""


class PullingEngines(EngineActors):
    """Engines that share one queue.

    decoding_seconds: time that each engine has spent on decoding for training.
    wasted_tokens, carried_tokens: sampled tokens that were sampled anew, or continued, after an update of the weights,
        since the last call of `metrics`.
    on_report: called after each report.
    before_replacing: called when engines were lost; raises where the stage has to start again anyway.
    restore: sends replaced engines the weights of the others; None where they are those of the checkpoint.
    """

    def __init__(self, *args: Any) -> None:
        """Start the engines (see EngineActors)."""
        super().__init__(*args)
        self._queue = GenerationQueue[StoredCompletion](len(self._engines))
        self._room = [self._config.max_num_seqs] * len(self._engines)
        self._calls: dict[Any, int] = {}  # engines that decode, by the stream of their report
        self.before_replacing: Callable[[], None] | None = None
        self.restore: Callable[[], None] | None = None
        self.decoding_seconds = [0.0] * len(self._engines)
        self.on_report: Callable[[], None] | None = None
        self._reset_counters()

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[StoredGroup]:
        """Sample `num_completions` answers to each prompt; yield each group as it finishes, with its prompt's index.

        The same weights, request and seed give the same groups, in varying order, with any number of engines
        (docs/numerics.md says when to the bit).

        Raises ValueError for a prompt that is too long, RolloutError when the timeout passes, or when more engines are
        lost than `max_replacements`.
        """
        yield from self.groups(self.submit(prompts, sampling, num_completions, seed))

    def submit(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int, step: int = 0
    ) -> int:
        """Queue a request as `generate` does, and return its ticket for `groups`. One of a training step waits for
        those of earlier steps, and while the engines are `reserved`."""
        refuse_equal_completions(sampling, num_completions)
        refuse_prompts(prompts, sampling.max_tokens, self._config.max_model_len)
        return self._queue.add(prompts, sampling, num_completions, seed, step)

    def groups(self, ticket: int) -> Iterator[StoredGroup]:
        """Yield the groups of a request as they finish. Raises as `generate`."""
        deadline = time.monotonic() + self._config.timeout_seconds
        try:
            is_last = False
            while not is_last:
                # The deadline is for the whole request. Finished groups are yielded even past it, after a slow caller.
                groups, is_last = self._queue.pop(ticket)
                yield from groups
                if is_last:
                    return
                if self._lost:
                    self._replace_and_restore()
                    deadline = time.monotonic() + self._config.timeout_seconds
                if not self._turn(deadline - time.monotonic()):
                    late = ", ".join(map(self._name, sorted(self._calls.values())))
                    raise RolloutError(
                        f"rollout {late}: not finished within {self._config.timeout_seconds:g} s; raise "
                        "rollout.timeout_seconds if it needs longer"
                    )
        finally:
            for number in self._queue.drop(ticket):
                self._engines[number].call.remote("drop", [ticket])

    def finished(self, ticket: int) -> list[StoredGroup]:
        """Return the groups of a request that are finished and that nobody has got."""
        return self._queue.pop(ticket)[0]

    def work_until(self, calls: Sequence[Any], seconds: float) -> None:
        """Keep the engines at work until Ray's `calls` are done or `seconds` are over. An engine that is lost meanwhile
        is replaced by the next `groups` or sync. Raises RolloutError where an engine fails."""
        deadline, pending = time.monotonic() + seconds, set(calls)
        while pending and (left := deadline - time.monotonic()) > 0:
            self._feed()
            ready, _ = ray.wait([*pending, *self._calls], num_returns=1, timeout=left)
            pending.difference_update(ready)
            for call in self._calls.keys() & {*ready}:
                self._take_in(call)

    def work(self, seconds: float) -> None:
        """Keep the engines at work for `seconds`, or until the next report. Raises as `work_until`."""
        self._feed()
        if not self._calls:
            time.sleep(seconds)
            return
        ready: list[Any]
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        for call in ready:
            self._take_in(call)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Let the engines hold nothing of training steps within the block: they give it back with its tokens, and go
        on with it afterwards, with the weights that they have then."""
        self._drain()
        before, self._queue.holds_steps = self._queue.holds_steps, True
        self.carried_tokens += self._withdraw()
        try:
            yield
        finally:
            self._queue.holds_steps = before
        self._feed()

    def replace_lost(self) -> None:
        """Start an engine for each that was lost. Raises RolloutError where more are lost than `max_replacements`."""
        self._drain()
        if self._lost and self.before_replacing is not None:
            self.before_replacing()
        for number in self._replace() if self._lost else []:
            self._queue.give_back(number)

    def _replace_and_restore(self) -> None:
        if self.restore is not None:
            self._drain()
            self._withdraw()
        self.replace_lost()
        if self.restore is not None:
            self.restore()

    def _withdraw(self) -> int:
        """Let what the living engines hold wait, with its tokens, so that weights can be sent to all; return the number
        of these tokens."""
        num_tokens = 0
        for number in range(len(self._engines)):
            if self._queue.is_busy(number) and number not in self._lost:
                try:
                    begun = self._get(self._engines[number].call.remote("withdraw"), number, "'withdraw'")
                    self._queue.give_back(number, begun)
                    num_tokens += sum(len(tokens.token_ids) for tokens in begun.values())
                except EngineLost:
                    continue  # replaced with the other
        return num_tokens

    def _turn(self, seconds: float) -> bool:
        """Give requests to engines with room, and take in the next report within `seconds`. Returns False if there was
        none, although an engine decodes or something waits for one."""
        self._feed()
        if not self._calls:
            return bool(self._lost)
        ready: list[Any]
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=max(0.0, seconds))
        for call in ready:
            self._take_in(call)
        return bool(ready)

    def _feed(self) -> None:
        seconds = max(SLICE_SECONDS, 0.02 * len(self._engines))
        for number in {*range(len(self._engines))} - {*self._calls.values(), *self._lost}:
            room = self._room[number] if self._queue.is_busy(number) else self._config.max_num_seqs
            requests = self._queue.take(number, room)
            if requests or self._queue.is_busy(number):
                advance = self._engines[number].advance.options(num_returns="streaming")
                self._calls[advance.remote(requests, seconds, REPORT_SECONDS)] = number

    def _take_in(self, call: Any) -> None:
        number = self._calls.pop(call)
        try:
            self._get(call.completed(), number, "a generation")
            progress: Progress[StoredCompletion] = self._get(next(call), number, "a generation")
        except EngineLost:
            return  # noted, and replaced by the caller of `groups`
        self._room[number] = progress.room
        if not self._queue.holds_steps:  # else it evaluates
            self._tokens[number] += progress.num_tokens
            self._seconds[number] += progress.seconds
            self.decoding_seconds[number] += progress.seconds
            self.wasted_tokens += progress.num_wasted
        finished = [
            (key, replace(completion, columns=next(call)), None if routes is None else next(call))
            for key, completion, routes in progress.finished
        ]
        self._queue.receive(number, replace(progress, finished=finished))
        if self.on_report is not None:
            self.on_report()

    def _drain(self) -> None:
        """Wait for the reports of the engines that decode."""
        for call in list(self._calls):
            self._take_in(call)

    def _reset_counters(self) -> None:
        self._tokens, self._seconds, self._sync_seconds = [0] * len(self._engines), [0.0] * len(self._engines), 0.0
        self.wasted_tokens = self.carried_tokens = 0
