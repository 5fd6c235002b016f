"""Checkpoints behind vLLM's own server on this machine, and the answers of a server."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import httpx

from jobs.command import ERR

START_SECONDS = 900.0
"""Longest time that a server may take to load a model."""
STOP_SECONDS = 15.0
_LOG_LINES = 15


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint that is given by its folder, by its stage's, or by a name on the hub.

    Raises ValueError for a run or a stage without a result, naming the folders that have one, and as resolve_model.
    """
    from configs.model import ModelConfig
    from pipeline.disk.recorded import LINEAGE
    from pipeline.weights.resolve import resolve_model

    folder = Path(name).expanduser()
    if (folder / "hf" / "config.json").is_file():
        return (folder / "hf").resolve()  # a running stage may replace the link
    results = sorted(str(file.parent) for file in folder.glob("*/hf/config.json")) if folder.is_dir() else []
    if results:
        raise ValueError(f"'{name}' is a run; give one of its results: {', '.join(results)}")
    if (folder / LINEAGE).is_file():
        raise ValueError(
            f"'{name}' is a stage without a model (no {folder / 'hf'}): it has not finished, or makes none"
        )
    return resolve_model(ModelConfig(path=name), workdir=folder)


def policy_folder(name: str) -> Path:
    """The folder of a checkpoint that answers. Raises ValueError as checkpoint_folder, and for a reward model."""
    from rollout.checkpoint import is_reward_model

    folder = checkpoint_folder(name)
    if is_reward_model(folder):
        raise ValueError(
            f"'{name}' is a reward model, which answers nothing; score with it: `alignyard reward score reward_model "
            f"path={folder} --data FILE --out FILE`, or `alignyard serve {name}`"
        )
    return folder


@contextmanager
def served(folder: Path, name: str) -> Iterator[str]:
    """Serve a checkpoint on a free port while the block runs; yields the server's address.

    It ends with the block, and with this process but for SIGKILL. Raises ValueError with the end of the server's log
    where it does not start.
    """
    from rollout.process import free_port
    from rollout.serving import server_command, server_environment

    url = f"http://127.0.0.1:{(port := free_port())}"
    command = server_command(folder, name, "127.0.0.1", port)
    # Without handlers Python would end at once, and the server go on. Only the main thread may set them.
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, _exit) for number in numbers}
    with tempfile.NamedTemporaryFile("w+", prefix="alignyard-serve-", suffix=".log") as log:
        server = subprocess.Popen(
            command, env=server_environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _await_health(server, url, name, Path(log.name))
            yield url
        finally:
            _end(server)
            for number, handler in before.items():
                signal.signal(number, handler)


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _await_health(server: "subprocess.Popen[bytes]", url: str, name: str, log: Path) -> None:
    started = time.monotonic()
    with ERR.status("") as status:
        while True:
            waited = time.monotonic() - started
            status.update(f"vLLM loads {name}: {waited:.0f} s")
            if server.poll() is not None or waited > START_SECONDS:
                reason = "took too long to start" if server.poll() is None else "ended while it started"
                tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-_LOG_LINES:])
                raise ValueError(f"vLLM's server of '{name}' {reason}; its last lines:\n{tail}")
            try:
                if httpx.get(f"{url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.5)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """End the server with its engine, which is in its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def served_model(url: str) -> str:
    """The name of the first model that a server has. Raises ValueError where none answers."""
    try:
        return httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ValueError(f"no server with OpenAI's protocol answers at {url} ({error})") from error


def answer_pieces(url: str, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yields the answer's text as it comes, the last piece with its finish_reason. Raises ValueError where the server
    refuses."""
    # As in rollouts, the text keeps the special tokens that end no turn, such as <think>.
    request, patience = body | {"stream": True, "skip_special_tokens": False}, httpx.Timeout(30, read=600)
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=patience) as reply:
            if reply.is_error:
                text = reply.read().decode(errors="replace")[:500]
                raise ValueError(f"{url} refused: HTTP {reply.status_code}: {text}")
            for line in reply.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                if "error" in event:
                    raise ValueError(f"{url} stopped: {str(event['error'])[:500]}")
                for choice in event.get("choices", [])[:1]:
                    yield choice["delta"].get("content") or "", choice.get("finish_reason")
    except httpx.TransportError as error:
        raise ValueError(f"the server at {url} is gone ({type(error).__name__}: {error})") from error
