"""A real headless browser for tests, spoken to over its DevTools protocol.

It is the one of the machine, or else the one that the npm package `@sparticuz/chromium` brings with the libraries and
fonts it needs, where set-up has put that into `.venv/browser`.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
PACKED = Path(__file__).parents[1] / ".venv" / "browser" / "node_modules" / "@sparticuz" / "chromium" / "bin"
UNPACK = """
const fs = require("fs"), zlib = require("zlib"), [packed, made] = process.argv.slice(1);
for (const name of ["chromium", "al2023.tar", "fonts.tar"])
  fs.writeFileSync(`${made}/${name}`, zlib.brotliDecompressSync(fs.readFileSync(`${packed}/${name}.br`)));
"""
SECONDS = 60


class Page:
    """One page of the browser: what it says of errors is kept in `errors`."""

    def __init__(self, connection: ClientConnection) -> None:
        self.errors: list[str] = []
        self._connection = connection
        self._calls = 0
        self._loaded = False
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, *, width: int, dark: bool = False) -> None:
        """Shows a file at so many CSS pixels' width, 812 high, as a phone does below 500."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=812, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.errors.clear()
        self._loaded = False
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        said = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        self._calls += 1
        number = self._calls
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._connection.recv(timeout=SECONDS))
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.errors.append(json.dumps(params["args"]))
            case _:
                pass
        return message


@contextmanager
def browser_page() -> Iterator[Page]:
    """A page of a browser that lives as long as the block. Skips the test where there is no browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        program, environment = _program(Path(home))
        command = [
            program,
            "--headless",
            "--no-sandbox",  # root, as in many containers, has no other way; the pages are our own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={home}",
            "about:blank",
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            with connect(_page_address(process), max_size=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
            process.communicate(timeout=SECONDS)


def _program(home: Path) -> tuple[str, dict[str, str]]:
    for name in ON_PATH:
        if found := shutil.which(name):
            return found, dict(os.environ)
    node = shutil.which("node")
    if not (PACKED / "chromium.br").is_file() or node is None:
        pytest.skip(f"no browser: none of {', '.join(ON_PATH)} is on the PATH, and set-up has put none into {PACKED}")
    unpacked = PACKED.parents[3] / "unpacked"
    if not unpacked.is_dir():
        if not os.access(unpacked.parent, os.W_OK):
            pytest.skip(f"no browser: it is not unpacked yet, and {unpacked.parent} belongs to another user")
        partial = Path(tempfile.mkdtemp(dir=unpacked.parent))
        subprocess.run([node, "-e", UNPACK, str(PACKED), str(partial)], check=True, timeout=SECONDS)
        for archive in ("al2023.tar", "fonts.tar"):
            shutil.unpack_archive(partial / archive, partial, filter="data")
        (partial / "chromium").chmod(0o755)
        partial.rename(unpacked)
    # Named at each start, since the folder may have moved since it was unpacked; without fonts all text has no width.
    fonts = home / "fonts.conf"
    fonts.write_text(f"<fontconfig><dir>{unpacked.resolve() / 'fonts'}</dir></fontconfig>")
    libraries = {"LD_LIBRARY_PATH": str(unpacked / "lib"), "FONTCONFIG_FILE": str(fonts)}
    return str(unpacked / "chromium"), os.environ | libraries


def _page_address(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"DevTools listening on ws://([^/]+)", line):
            break
    else:
        pytest.fail(f"the browser ended before it could be spoken to: {''.join(said)}")
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://{found[1]}/json/list", timeout=SECONDS) as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        if pages:
            return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    pytest.fail("the browser shows no page")
