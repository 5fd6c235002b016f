"""`alignyard serve` and `alignyard chat`: a trained checkpoint behind vLLM's own server, and a talk with it."""

import os
import sys
from typing import Annotated, Any

from typer import Argument, Option

from configs.visible import visible
from jobs.command import OUT, verb_app
from jobs.serving import answer_pieces, checkpoint_folder, policy_folder, served, served_model

app = verb_app()

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
    with served(policy_folder(model), model) as url:
        return _talk(url, message, system, body)


def _talk(url: str, message: str | None, system: str, body: dict[str, Any]) -> int:
    """Asks `message` alone, or holds conversations until the input ends."""
    model = served_model(url)
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
    for piece, reason in answer_pieces(url, body):
        answer, finish = answer + piece, reason or finish
        sys.stdout.write(visible(piece))
        sys.stdout.flush()
    OUT.print("" if finish != "length" else "\n(cut short: --max-tokens, or the model's window)", style="dim")
    return answer
