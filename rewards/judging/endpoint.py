"""Client of an OpenAI-compatible endpoint: one request, one answer, with retries."""

import asyncio
import json
import random
from itertools import count
from typing import Any

import httpx

from rewards.judging.rubric import NoScore, excerpt

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0
"""Seconds before the second attempt, doubled for each further one up to the second figure."""
_BUSY = (408, 409, 425, 429)


class EndpointError(Exception):
    """Raised where the endpoint refuses or is not reached in time. The message holds its last response."""


class Endpoint:
    """The chat completions endpoint below the address `url`. It belongs to the event loop of its first request.

    `key` is sent as a bearer token and appears in no message. connections: requests that are open at a time.
    """

    def __init__(self, url: str, key: str | None, connections: int) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._key = key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # The deadline of `ask` covers all attempts, so a single one needs no timeout.
        limits = httpx.Limits(max_connections=connections)
        self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)

    async def ask(self, body: dict[str, Any], deadline: float) -> str:
        """The text of the answer to the request `body`.

        A request that meets a busy, failing or unreachable endpoint is sent again, after a wait that doubles or that
        `Retry-After` sets, as long as the wait ends before `deadline`, a time of the event loop.

        Raises EndpointError where the endpoint refuses or no time is left, NoScore for an answer without text.
        """
        content = json.dumps(body).encode()
        for attempt in count():
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1)
            try:
                response = await self._client.post(self._url, content=content)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == httpx.codes.OK:
                    return _text(response)
                problem = f"HTTP {response.status_code}: {excerpt(response.text)}"
                if response.status_code not in _BUSY and response.status_code < 500:
                    raise EndpointError(self._without_key(f"{self._url} refused: {problem}"))
                wait = max(wait, _retry_after(response))
            if asyncio.get_running_loop().time() + wait >= deadline:
                message = f"{self._url}: attempt {attempt + 1} and no time left: {problem}"
                raise EndpointError(self._without_key(message))
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _without_key(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


def _retry_after(response: httpx.Response) -> float:
    """Seconds in the header `Retry-After`; 0 where it is missing or a date."""
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _text(response: httpx.Response) -> str:
    try:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise NoScore(f"no chat completion: {excerpt(response.text)}") from error
    if not isinstance(text, str) or not text.strip():
        raise NoScore(f"an answer without text, ended by {reason!r}")
    if reason == "length":  # a number in an unfinished thought is no score
        raise NoScore(f"an answer cut short; raise max_tokens: {excerpt(text)}")
    return text
