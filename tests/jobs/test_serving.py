"""A checkpoint served, talked with and scored, by the code of docs/serving.md."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from jobs import serving as servers
from jobs.cli import main
from pipeline.data.chat import ChatFormat
from pipeline.judging.scorer import Scorer
from pipeline.models.tokenizer import load_tokenizer
from pipeline.weights.load import load_model
from rollout import serving
from rollout.process import free_port
from tests.pipeline.small_models import small_causal_lm, small_reward_model

HOME = Path(__file__).parents[2]
PAGE = (HOME / "docs" / "serving.md").read_text(encoding="utf-8")
POLICY = {"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_attention_heads": 4, "dtype": "bfloat16"}


def checkpoint(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(POLICY | settings))
    return folder


def options(command: list[str]) -> dict[str, str]:
    return dict(zip(command[4:], [*command[5:], ""], strict=True))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_checkpoint_is_served_in_its_own_precision(
    on_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "is_cpu_build", lambda: on_cpu)
    command = serving.server_command(checkpoint(tmp_path / "hf"), "mine", "127.0.0.1", 9, ["--dtype", "float32"])
    given = options(command)
    assert (given["--served-model-name"], given["--port"]) == ("mine", "9")
    assert command[command.index("--dtype") + 1] == "bfloat16" and command[-2:] == ["--dtype", "float32"]
    assert ("--enforce-eager" in given) == on_cpu and "--runner" not in given
    assert serving.server_environment().get("VLLM_MLA_DISABLE") == (
        os.environ.get("VLLM_MLA_DISABLE", "1") if on_cpu else os.environ.get("VLLM_MLA_DISABLE")
    )


def test_a_reward_model_is_served_without_a_sigmoid(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "hf", architectures=["LlamaForSequenceClassification"])
    given = options(serving.server_command(folder, "rm", "127.0.0.1", 9))
    assert given["--runner"] == "pooling" and json.loads(given["--pooler-config"]) == {"use_activation": False}


def test_heads_that_no_cpu_engine_computes_are_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "is_cpu_build", lambda: True)
    assert main(["serve", str(checkpoint(tmp_path / "hf", head_dim=16))]) == 2
    assert "attention heads of 16" in capsys.readouterr().err


def test_what_has_no_answer_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = checkpoint(tmp_path / "run" / "rm" / "hf", architectures=["LlamaForSequenceClassification"]).parent
    (tmp_path / "run" / "pairs").mkdir()
    (tmp_path / "run" / "pairs" / "lineage.json").write_text("{}")
    for name, reason in (
        (str(stage), "is a reward model"),
        (str(tmp_path / "run"), f"one of its results: {stage / 'hf'}"),
        (str(tmp_path / "run" / "pairs"), "is a stage without a model"),
        ("http://127.0.0.1:1", "no server"),
    ):
        assert main(["chat", name, "hello"]) == 2
        assert reason in capsys.readouterr().err


def test_a_stage_stands_for_its_result(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "run" / "sft" / "hf")
    assert servers.checkpoint_folder(str(folder.parent)) == servers.checkpoint_folder(str(folder)) == folder


class Parrot(BaseHTTPRequestHandler):
    """Streams back the last message, with an escape sequence in it."""

    requests: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._reply("application/json", json.dumps({"data": [{"id": "parrot"}]}))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(request)
        words = [*request["messages"][-1]["content"].split(), "\x1b[31m"]
        events = [{"choices": [{"delta": {"content": f"{word} "}, "finish_reason": None}]} for word in words]
        events.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self._reply("text/event-stream", "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")

    def _reply(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def parrot() -> Iterator[str]:
    Parrot.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_conversation_is_streamed_remembered_and_begun_anew(
    parrot: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one two", "three", "", "four"])

    def read(_: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", parrot, "--system", "be brief", "--temperature", "0.5", "--max-tokens", "7"]) == 0
    shown = capsys.readouterr().out
    assert r"one two \x1b[31m" in shown and "\x1b[31m" not in shown and "cut short" in shown
    roles = [[message["role"] for message in request["messages"]] for request in Parrot.requests]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert {(request["temperature"], request["max_tokens"]) for request in Parrot.requests} == {(0.5, 7)}


def test_a_server_that_does_not_start_shows_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no room for the KV cache')"]
    monkeypatch.setattr(serving, "server_command", lambda *_: command)
    assert main(["chat", str(checkpoint(tmp_path / "hf")), "hello"]) == 2
    assert "ended while it started" in (shown := capsys.readouterr().err) and "no room for the KV cache" in shown


def test_the_server_ends_with_the_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; from http.server import *; "
    script += "HTTPServer(('127.0.0.1', int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()"
    (tmp_path / "health").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "server_command", lambda _, __, ___, port: [sys.executable, "-c", script, str(port)])
    with servers.served(tmp_path, "mine") as url:
        assert httpx.get(f"{url}/health").is_success
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def in_shell(command: list[str] | str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(HOME), "VLLM_LOGGING_LEVEL": "ERROR"}
    shell = isinstance(command, str)
    done = subprocess.run(
        command, cwd=folder, env=environment, shell=shell, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def running_server(name: str, folder: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "jobs.cli", "serve", name, "--port", str(port), "--max-num-seqs", "4"]
    environment = os.environ | {"PYTHONPATH": str(HOME)}
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        servers._await_health(server, f"http://127.0.0.1:{port}", name, folder / "serve.log")
        yield
    finally:
        servers._end(server)


ANSWER = "42 pens, gladly"


def taught_to_answer(folder: Path) -> Path:
    """A DeepSeek-V3 that gives one answer."""
    path = small_causal_lm("deepseek_v3", folder)
    model, tokenizer = load_model(path, "float32").train(), load_tokenizer(path)
    messages = [{"role": "user", "content": "17+25="}, {"role": "assistant", "content": ANSWER}]
    ids, mask = (torch.tensor([row]) for row in ChatFormat(tokenizer).training_ids(messages))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = model(ids, labels=torch.where(mask == 1, ids, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.engine
def test_the_pages_code_gives_one_answer_and_one_score(tmp_path: Path) -> None:
    page, port = code("python"), free_port()
    policy = taught_to_answer(tmp_path / "runs/demo/grpo_preference/hf")
    rm = small_reward_model(policy, tmp_path / "runs/demo/rm_helpful/hf")
    by_transformers, by_vllm, score_by_transformers, score_by_server = page
    assert in_shell([sys.executable, "-c", by_transformers], tmp_path).strip() == ANSWER
    (tmp_path / "by_vllm.py").write_text(by_vllm)
    assert ANSWER in in_shell([sys.executable, "by_vllm.py"], tmp_path).splitlines()
    with running_server("runs/demo/grpo_preference", tmp_path, port):
        [curl] = [block for block in code("sh") if block.startswith("curl")]
        [choice] = json.loads(in_shell(curl.replace("8000", str(port)), tmp_path))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")
        chat = [sys.executable, "-m", "jobs.cli", "chat", f"http://127.0.0.1:{port}", "17+25="]
        assert in_shell(chat, tmp_path).strip() == ANSWER
    [expected] = Scorer(rm, "float32", 512).scores(
        [([{"role": "user", "content": "lend 3 pens"}], "gladly! 3 pens for you")]
    )
    scores = [in_shell([sys.executable, "-c", score_by_transformers], tmp_path)]
    with running_server("runs/demo/rm_helpful", tmp_path, port):
        scores.append(in_shell([sys.executable, "-c", score_by_server.replace("8000", str(port))], tmp_path))
    assert [float(score) for score in scores] == pytest.approx([expected] * 2, abs=1e-4)
