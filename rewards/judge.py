"""A language model as a judge: asked with a rubric at an OpenAI-compatible address."""

import asyncio
import os
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from configs.rewards import PoolName
from rewards.judging.cache import AnswerCache
from rewards.judging.endpoint import Endpoint
from rewards.judging.rubric import TRIES, Message, NoScore, Rubric, Vote, averaged
from rewards.types import Task, Verdict

_OURS = ("model", "messages", "n", "stream")


class JudgeReward(Rubric):
    """The score that a language model gives by a rubric, asked at an OpenAI-compatible address (vLLM, SGLang, a
    provider): an LLM as judge, or a generative reward model.

    Its number is the score as it stands, the mean where there are several votes. An answer that is no score is asked
    for again, TRIES times in all; then, and where the endpoint fails or refuses, there is no verdict. The completions
    of a group are asked at the same time.
    """

    pool: ClassVar[PoolName] = "model"

    url: str
    """Address that ends before /chat/completions, as in http://judge:8000/v1. No password may be part of it."""
    model: str
    """The judge's name there."""
    api_key_env: str | None = None
    """Environment variable that holds the key, where the judging workers run. The key itself is written nowhere."""
    params: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request, such as {temperature: 0, max_tokens: 512}."""
    seconds: float = Field(default=60.0, gt=0)
    """Longest one verdict may take, with all votes and all attempts."""
    connections: int = Field(default=16, ge=1)
    """Questions that one worker has open at a time."""
    cache: str | None = None
    """Folder in which answers are kept and found again: what was asked once, by whatever run, is not asked again. A
    judge is known by its url and model only: give another folder to another of the same name. None keeps no answers."""

    @model_validator(mode="after")
    def _askable(self) -> "JudgeReward":
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
            raise ValueError(f"url='{self.url}' is no address like http://judge:8000/v1")
        if address.username or address.password:
            raise ValueError("the url holds a user or password, which would be recorded; use api_key_env")
        ours = sorted(set(self.params) & set(_OURS))
        if ours:
            raise ValueError(f"params.{ours[0]} is not for params: it is set by the judge itself")
        if self.votes > 1 and self.params.get("temperature") == 0:
            raise ValueError(f"votes={self.votes} at params.temperature=0 are all the same; raise it or ask once")
        return self

    def setup(self) -> None:
        """Find key and cache. Raises ValueError where they can't be had; the endpoint is not asked yet."""
        _ = self._endpoint, self._cache

    def time_limit(self, task: Task) -> float:
        """Seconds that a verdict may take."""
        return self.seconds

    async def score(self, task: Task, completion: str) -> Verdict:
        """The mean of the votes. Raises NoScore and EndpointError as the class says."""
        question = self.question(task, completion)
        deadline = asyncio.get_running_loop().time() + self.seconds
        votes = [self._vote(question, number, deadline) for number in range(self.votes)]
        # All of them are waited for, so that those that came are kept for the next try.
        given = await asyncio.gather(*votes, return_exceptions=True)
        for vote in given:
            if isinstance(vote, BaseException):
                raise vote
        return averaged(cast(list[Vote], given))

    async def _vote(self, question: list[Message], number: int, deadline: float) -> Vote:
        body = {"model": self.model, "messages": question, **self.params}
        asked = {"url": self.url, "vote": number, **body}
        kept = self._cache.get(asked) if self._cache else None
        if kept is not None:
            try:
                return self.read(kept), kept
            except NoScore:  # kept when another form or range was agreed on
                pass
        trouble = NoScore("not asked")
        for _ in range(TRIES):
            try:
                answer = await self._endpoint.ask(body, deadline)
                score = self.read(answer)
            except NoScore as error:
                trouble = error
            else:
                if self._cache:
                    self._cache.put(asked, answer)
                return score, answer
        raise NoScore(f"no score in {TRIES} answers; the last: {trouble}")

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
