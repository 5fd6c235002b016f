import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest
import ray

from jobs import submission
from jobs.submission import Jobs


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A job server that says its version, and then answers nothing."""
    end = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/api/version":
                end.wait()
                return
            body = json.dumps({"ray_version": ray.__version__, "version": "4", "ray_commit": ""}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    end.set()
    server.shutdown()


def test_a_job_server_that_does_not_answer_is_not_waited_for(
    silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(silent_server)
    monkeypatch.setattr(submission, "REQUEST_SECONDS", 0.2)
    assert jobs.ended("a-job") is None and jobs._silent_since is not None
