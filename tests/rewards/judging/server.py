"""An OpenAI-compatible endpoint on this machine that does as the completion tells it."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUBRIC = "Rate the answer to {prompt} from 1 to 10, like [[7]].\n<answer>{completion}</answer>"


class Judge(ThreadingHTTPServer):
    """`asked` counts requests by completion, `bodies` and `keys` are what they held."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is none."""


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = re.search(r"<answer>(.*)</answer>", body["messages"][-1]["content"], re.DOTALL)
        completion = found[1] if found else ""
        with server.lock:
            server.asked[completion] += 1
            number = server.asked[completion]
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self._act(completion, number)
        finally:
            with server.lock:
                server.open -= 1

    def _act(self, completion: str, number: int) -> None:
        """Completions are `VERB ARGUMENT`, or a VERB alone."""
        verb, _, argument = completion.partition(" ")
        match verb:
            case "say":
                self._answer(argument)
            case "slowly":
                time.sleep(0.3)
                self._answer(argument)
            case "[Answer":  # several, each `worth N`; the one in the first place gets a point more
                first, *rest = map(int, re.findall(r"worth (\d)", completion))
                self._answer(f"[[{', '.join(map(str, [first + 1, *rest]))}]]")
            case "nth":  # each request its own word
                self._answer(argument.split("|")[min(number, argument.count("|") + 1) - 1])
            case "hang":
                self.server.released.wait(60)
            case "status":  # of the first request; then a score
                code = int(argument)
                self._answer("[[4]]") if number > 1 else self._send(code, b"busy", {"Retry-After": "0"})
            case "always":
                self._send(int(argument), f"no: {self.headers.get('Authorization')}".encode())
            case "drop":  # the first connection
                self._answer("[[5]]") if number > 1 else self.connection.close()
            case "raw":
                self._send(200, argument.encode())
            case _:
                self._answer("no idea")

    def _answer(self, text: str) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self._send(200, json.dumps({"choices": [choice]}).encode())

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def judge_server() -> Iterator[Judge]:
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()
