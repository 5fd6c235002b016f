"""`alignyard serve` and `alignyard chat`: a trained checkpoint behind vLLM's own server, and a talk with it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
from typer import Argument, Option

from jobs.command import ERR, OUT, verb_app, visible

app = verb_app()
START_SECONDS = 900.0
"""Longest time that a server may take to load a model."""
STOP_SECONDS = 15.0
_LOG_LINES = 15

Checkpoint = Annotated[
    str, Argument(metavar="CHECKPOINT", help="A checkpoint's folder, a stage's folder, or a model of the hub.")
]


@app.command("serve", context_settings={"ignore_unknown_options": True})
def serve_checkpoint(
    checkpoint: Checkpoint,
    options: Annotated[
        list[str],
        Argument(metavar="VLLM_OPTION", default_factory=list, show_default=False, help="Passed to vLLM's server."),
    ],
    host: Annotated[str, Option(metavar="NAME", help="Address; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Option(metavar="N", help="Port to listen at.")] = 8000,
) -> int:
    """Serve a checkpoint by vLLM's own server, which speaks OpenAI's protocol.

    It has the precision of the checkpoint and the corrections that vLLM needs on CPUs. A reward model is served for
    scores, at /pooling. Further options are vLLM's. Ctrl-C ends it.

    \b
    Examples:
      alignyard serve runs/demo/grpo_preference
      alignyard serve runs/demo/rm_helpful/hf --port 8001
      alignyard serve org/model --host 0.0.0.0 --tensor-parallel-size 4 --api-key SECRET
    """
    from rollout.checkpoint import is_reward_model
    from rollout.serving import server_command, server_environment

    folder = checkpoint_folder(checkpoint)
    command = server_command(folder, checkpoint, host, port, options)
    path = "pooling" if is_reward_model(folder) else "v1/chat/completions"
    OUT.print(f"serving {folder} as '{checkpoint}'; ready when http://{host}:{port}/health answers", soft_wrap=True)
    OUT.print(f"  POST http://{host}:{port}/{path}, Ctrl-C ends it; docs/serving.md has clients", soft_wrap=True)
    sys.stdout.flush()
    os.execve(command[0], command, server_environment())


@app.command()
def chat(
    model: Annotated[str, Argument(metavar="CHECKPOINT|URL", help="As with `serve`, or the address of a server.")],
    message: Annotated[str | None, Argument(metavar="MESSAGE", help="One question. [default: a conversation]")] = None,
    system: Annotated[str, Option(metavar="TEXT", help="System message.")] = "",
    temperature: Annotated[float, Option(metavar="T", help="0 takes the likeliest token.")] = 0.0,
    max_tokens: Annotated[int | None, Option(metavar="N", help="Longest answer. [default: what fits]")] = None,
) -> int:
    """Talk with a checkpoint, in the terminal. An empty line starts a new conversation, Ctrl-D ends.

    The checkpoint is served by vLLM on a free port of this machine while you talk.

    \b
    Examples:
      alignyard chat runs/demo/grpo_preference
      alignyard chat runs/demo/sft/hf "17+25="
      alignyard chat http://127.0.0.1:8000 --temperature 1
    """
    body = {"temperature": temperature} | ({} if max_tokens is None else {"max_tokens": max_tokens})
    if model.startswith(("http://", "https://")):
        return _talk(model.rstrip("/").removesuffix("/v1"), message, system, body)
    from rollout.checkpoint import is_reward_model

    folder = checkpoint_folder(model)
    if is_reward_model(folder):
        raise ValueError(
            f"'{model}' is a reward model, which answers nothing; score with it: `alignyard reward score reward_model "
            f"path={folder} --data FILE --out FILE`, or `alignyard serve {model}`"
        )
    with served(folder, model) as url:
        return _talk(url, message, system, body)


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
    return resolve_model(ModelConfig(path=name), workdir=folder, keep_fp8=True)


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
    # Without handlers Python would end at once, and the server go on.
    before = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGHUP)}
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


def _talk(url: str, message: str | None, system: str, body: dict[str, Any]) -> int:
    """Asks `message` alone, or holds conversations until the input ends."""
    try:
        model = httpx.get(f"{url}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ValueError(f"no server with OpenAI's protocol answers at {url} ({error})") from error
    start = [{"role": "system", "content": system}] if system else []
    if message is not None:
        _print_answer(url, body | {"model": model, "messages": [*start, {"role": "user", "content": message}]})
        return 0
    messages = list(start)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not text.strip():
            messages = list(start)
            OUT.print("(a new conversation)", style="dim")
            continue
        messages.append({"role": "user", "content": text})
        answer = _print_answer(url, body | {"model": model, "messages": messages})
        messages.append({"role": "assistant", "content": answer})


def _print_answer(url: str, body: dict[str, Any]) -> str:
    """Prints the answer as it comes, and returns it."""
    answer, finish = "", None
    for piece, reason in _pieces(url, body):
        answer, finish = answer + piece, reason or finish
        sys.stdout.write(visible(piece))
        sys.stdout.flush()
    OUT.print("" if finish != "length" else "\n(cut short: --max-tokens, or the model's window)", style="dim")
    return answer


def _pieces(url: str, body: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
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
