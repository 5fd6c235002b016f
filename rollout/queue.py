"""The queue of completions that engines pull from as they have room, so that a slow engine takes less.

A completion is a function of the weights, its prompt and its own seed, so it does not matter which engine samples it,
nor when. Its tokens so far are known here from time to time: those of a lost engine are continued by another one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple

from configs.sampling import SamplingConfig
from rollout.seeds import prompt_seeds
from rollout.types import AnyCompletion, AnyGroup, Begun


class CompletionKey(NamedTuple):
    """Place of a completion: the ticket of its request, the index of its prompt there, and its own in the group."""

    ticket: int
    prompt: int
    sample: int


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A completion to sample, or to continue from the tokens that it has `begun` with."""

    key: CompletionKey
    prompt_ids: list[int]
    sampling: SamplingConfig
    seed: int | None
    begun: Begun | None = None


@dataclass(frozen=True, slots=True)
class Progress(Generic[AnyCompletion]):
    """Work of an engine since its last report.

    finished: completions, each with its prompt's routes, or a reference to them, if it is the first of its group and
    routes are recorded; None for others.
    begun: further tokens of completions that take long. room: completions that the engine can take.
    num_tokens, seconds: sampled tokens of what is finished or was withdrawn, and time spent on decoding.
    num_wasted: sampled tokens that were withdrawn and are sampled anew.
    """

    finished: list[tuple[CompletionKey, AnyCompletion, Any]]
    begun: dict[CompletionKey, Begun]
    room: int
    num_tokens: int = 0
    seconds: float = 0.0
    num_wasted: int = 0


@dataclass
class _Ticket(Generic[AnyCompletion]):
    """A request: its prompts, and the completions that have come for each."""

    prompts: list[list[int]]
    num_completions: int
    step: int
    known_lengths: list[float]
    """Mean length in tokens that the completions of each prompt had in earlier requests, -1 where there were none."""
    groups: dict[int, dict[int, AnyCompletion]] = field(default_factory=dict[int, dict[int, AnyCompletion]])
    routes: dict[int, Any] = field(default_factory=dict[int, Any])
    complete: list[int] = field(default_factory=list[int])
    """Prompts with all their completions that were not taken yet."""
    missing: int = 0
    """Groups that were not taken yet."""


def completion_requests(
    ticket: int, prompts: Sequence[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
) -> list[CompletionRequest]:
    """Return the requests of `num_completions` answers to each prompt, each with its own seed."""
    seeds = prompt_seeds(seed, range(len(prompts))) if sampling.temperature else [None] * len(prompts)
    return [
        CompletionRequest(
            CompletionKey(ticket, place, index), prompt_ids, sampling, None if own is None else own + index
        )
        for place, (prompt_ids, own) in enumerate(zip(prompts, seeds, strict=True))
        for index in range(num_completions)
    ]


class GenerationQueue(Generic[AnyCompletion]):
    """Completions that wait for an engine, those that engines hold, and the groups that are complete.

    Requests are served in the order of the training steps that need them, those of no step first; of one step the
    oldest first. While `holds_steps` is true, as during an update of the weights, requests of steps wait.

    Of one request, completions that were begun come first, then the prompts whose answers were long before, then long
    prompts: what is started last should be short.

    Example:
        queue = GenerationQueue(num_engines=2)
        ticket = queue.add([[1, 5, 9]], SamplingConfig(max_tokens=8), num_completions=4, seed=0)
        requests = queue.take(0, room=8)
    """

    def __init__(self, num_engines: int) -> None:
        self._num_engines = num_engines
        self._tickets: dict[int, _Ticket[AnyCompletion]] = {}
        self._waiting: list[tuple[tuple[float, ...], CompletionRequest]] = []  # the last is the next
        self._held: list[dict[CompletionKey, CompletionRequest]] = [{} for _ in range(num_engines)]
        self._lengths: dict[int, float] = {}  # last mean length of a prompt's completions in tokens, by its hash
        self._last_ticket = 0
        self.holds_steps = False
        self.continued_tokens = self.restarted_completions = 0

    def add(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int, step: int = 0
    ) -> int:
        """Add a request of a training step, 0 for none, and return its ticket."""
        self._last_ticket += 1
        known = [self._lengths.get(hash(tuple(prompt_ids)), -1.0) for prompt_ids in prompts]
        self._tickets[self._last_ticket] = _Ticket(prompts, num_completions, step, known, missing=len(prompts))
        self._wait(completion_requests(self._last_ticket, prompts, sampling, num_completions, seed))
        return self._last_ticket

    def take(self, engine: int, room: int) -> list[CompletionRequest]:
        """Return the next requests for an engine with `room` for so many. An engine without work takes its share of
        all, whole groups if it can, so that a prompt is computed once."""
        servable = [
            (place, entry[1].key)
            for place, entry in reversed([*enumerate(self._waiting)])
            if not (self.holds_steps and self._tickets[entry[1].key.ticket].step)
        ]
        if not self._held[engine] and servable:
            idle = sum(not held for held in self._held)
            prompts = dict.fromkeys(key[:2] for _, key in servable)
            own = set([*prompts][::idle]) if len(prompts) >= idle else prompts.keys()
            room = min(room, -(-len(servable) // idle))
            servable = sorted(servable, key=lambda entry: entry[1][:2] not in own)  # stable
        places = [place for place, _ in servable[:room]]
        requests = [self._waiting[place][1] for place in places]
        for place in sorted(places, reverse=True):
            del self._waiting[place]
        self._held[engine] |= {request.key: request for request in requests}
        return requests

    def is_busy(self, engine: int) -> bool:
        """Return whether the engine holds completions."""
        return bool(self._held[engine])

    def receive(self, engine: int, progress: Progress[AnyCompletion]) -> None:
        """Note an engine's progress; what belongs to a dropped request is ignored."""
        held = self._held[engine]
        for key, begun in progress.begun.items():
            if key in held:
                before = held[key].begun
                held[key] = replace(held[key], begun=before.joined(begun) if before else begun)
        for key, completion, routes in progress.finished:
            if held.pop(key, None) is None:
                continue
            ticket = self._tickets[key.ticket]
            group = ticket.groups.setdefault(key.prompt, {})
            group[key.sample] = completion
            if key.sample == 0:
                ticket.routes[key.prompt] = routes
            if len(group) == ticket.num_completions:
                ticket.complete.append(key.prompt)
                lengths = [each.num_tokens for each in group.values()]
                self._lengths[hash(tuple(ticket.prompts[key.prompt]))] = sum(lengths) / len(lengths)

    def give_back(self, engine: int, begun: Mapping[CompletionKey, Begun] | None = None) -> None:
        """Let what an engine holds wait again: with the tokens `begun` by an engine that was asked for its work, or,
        for None, with the last known tokens of one that was lost."""
        requests = list(self._held[engine].values())
        self._held[engine] = {}
        if begun is not None:
            requests = [replace(request, begun=begun.get(request.key)) for request in requests]
        else:
            self.continued_tokens += sum(len(request.begun.token_ids) for request in requests if request.begun)
            self.restarted_completions += sum(request.begun is None for request in requests)
        self._wait(requests)

    def pop(self, ticket: int) -> tuple[list[AnyGroup[AnyCompletion]], bool]:
        """Return the groups of a request that are complete and were not returned yet, and whether they are the last."""
        own = self._tickets[ticket]
        groups = [
            AnyGroup(
                place, own.prompts[place], [completions[index] for index in sorted(completions)], own.routes[place]
            )
            for place in own.complete
            for completions in [own.groups.pop(place)]
        ]
        own.complete.clear()
        own.missing -= len(groups)
        return groups, own.missing == 0

    def drop(self, ticket: int) -> list[int]:
        """Forget a request; return the engines that still hold completions of it."""
        self._tickets.pop(ticket, None)
        self._waiting = [entry for entry in self._waiting if entry[1].key.ticket != ticket]
        holders: list[int] = []
        for engine, held in enumerate(self._held):
            own = [key for key in held if key.ticket == ticket]
            for key in own:
                del held[key]
            holders += [engine] if own else []
        return holders

    def _wait(self, requests: Iterable[CompletionRequest]) -> None:
        self._waiting += [(self._urgency(request), request) for request in requests]
        self._waiting.sort(key=lambda entry: entry[0])

    def _urgency(self, request: CompletionRequest) -> tuple[float, ...]:
        """Return the place of a request in the queue, whose end is served first."""
        key = request.key
        begun = len(request.begun.token_ids) if request.begun else -1
        ticket = self._tickets[key.ticket]
        known_length = ticket.known_lengths[key.prompt]
        return -ticket.step, -key.ticket, begun, known_length, len(request.prompt_ids), -key.prompt, -key.sample
