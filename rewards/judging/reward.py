"""A language model at an OpenAI-compatible address as a judge."""

import asyncio
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from configs.rewards import PoolName
from rewards.judging.cache import AnswerCache
from rewards.judging.endpoint import Endpoint, EndpointError
from rewards.judging.rubric import TRIES, NoScore, Rubric, Vote, read_verdict
from rewards.judging.votes import ALONE, draw_ballots, tally
from rewards.types import Task, Verdict

_RESERVED_PARAMS = ("model", "messages", "n", "stream")


class JudgeReward(Rubric):
    """The score that a language model gives by a rubric, at an OpenAI-compatible address (vLLM, SGLang, a provider): an
    LLM as judge, or a generative reward model.

    The score counts as it stands; several votes are averaged. For an answer without a score the judge is asked again,
    TRIES times in all. Then, and where the endpoint fails or refuses, the verdict is `infra_error`. The completions of
    a group are judged concurrently; with `compare` above 1 they are compared with each other.
    """

    pool: ClassVar[PoolName] = "model"

    url: str
    """Address up to /chat/completions, as in http://judge:8000/v1, without user or password."""
    model: str
    """Name of the model at the endpoint."""
    api_key_env: str | None = None
    """Environment variable of the judging workers that holds the key. The key itself is written nowhere."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as {temperature: 0, max_tokens: 512}."""
    seconds: float = Field(default=60.0, gt=0)
    """Longest time of one verdict, with all votes and all attempts."""
    connections: int = Field(default=16, ge=1)
    """Requests that one worker has open at a time."""
    cache: str | None = None
    """Folder that stores the answers, so that no run sends the same request again. Requests hold url and model: another
    model under the same url and name needs another folder. None stores nothing."""

    @model_validator(mode="after")
    def _askable(self) -> "JudgeReward":
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
            raise ValueError(f"url='{self.url}' is no address like http://judge:8000/v1")
        if address.username or address.password:
            raise ValueError("the url holds a user or password, which would be recorded; use api_key_env")
        reserved = sorted(set(self.params) & set(_RESERVED_PARAMS))
        if reserved:
            raise ValueError(f"params.{reserved[0]} is not for params: it is set by the judge itself")
        if self.votes > 1 and self.compare == 1 and self.params.get("temperature") == 0:
            raise ValueError(f"votes={self.votes} at params.temperature=0 are all the same; raise it or ask once")
        return self

    def setup(self) -> None:
        """Read the key and open the cache; no request is sent. Raises ValueError where either is missing."""
        _ = self._endpoint, self._cache

    def time_limit(self, task: Task) -> float:
        return self.seconds

    async def score(self, task: Task, completion: str) -> Verdict:
        """The mean of the votes on one completion."""
        [verdict] = await self._judge(task, [completion], self.seconds)
        return verdict

    async def score_list(self, task: Task, completions: list[str]) -> list[Verdict]:
        """The mean of the votes on each completion of a group, compared with the others."""
        if len(completions) == 1:
            return [ALONE]
        return await self._judge(task, completions, self.seconds * len(completions))

    async def _judge(self, task: Task, completions: list[str], seconds: float) -> list[Verdict]:
        deadline = asyncio.get_running_loop().time() + seconds
        ballots = draw_ballots(len(completions), self.compare, self.votes, self.text + "".join(completions))
        votes = [
            self._vote(self.question(task, *(completions[index] for index in ballot)), len(ballot), number, deadline)
            for number, ballot in enumerate(ballots)
        ]
        # Awaits all of them, so that the cache holds the good ones for the next try.
        results = await asyncio.gather(*votes, return_exceptions=True)
        outcomes: list[Vote | str] = []
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, NoScore | EndpointError):
                raise result
            outcomes.append(f"{type(result).__name__}: {result}" if isinstance(result, BaseException) else result)
        return tally(len(completions), ballots, outcomes)

    async def _vote(self, question: list[dict[str, str]], count: int, number: int, deadline: float) -> Vote:
        body = {"model": self.model, "messages": question, **self.params}
        request = {"url": self.url, "vote": number, **body}
        stored = self._cache.get(request) if self._cache else None
        if stored is not None:
            with suppress(NoScore):  # stored under another form or range
                return read_verdict(stored, count, self), stored
        problem = NoScore()
        for _ in range(TRIES):
            try:
                answer = await self._endpoint.ask(body, deadline)
                scores = read_verdict(answer, count, self)
            except NoScore as error:
                problem = error
            else:
                if self._cache:
                    self._cache.put(request, answer)
                return scores, answer
        raise NoScore(f"no score in {TRIES} answers; the last: {problem}")

    @cached_property
    def _endpoint(self) -> Endpoint:
        key = None
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ValueError(
                    f"args.api_key_env='{self.api_key_env}': no such variable where the judges run; set it before the "
                    "cluster's nodes start"
                )
        return Endpoint(self.url, key, self.connections)

    @cached_property
    def _cache(self) -> AnswerCache | None:
        return None if self.cache is None else AnswerCache(Path(self.cache).expanduser())
