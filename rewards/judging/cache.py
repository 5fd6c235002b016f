"""Answers of judges on disk, found by their request.

Each answer is one file, written under a temporary name and renamed. So any number of processes may share a folder, on a
network file system too: where two write the same answer at once, the later one stays.
"""

import hashlib
import json
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4


class AnswerCache:
    """A folder of answers. Raises ValueError where it can't be created or written to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cache='{folder}' can't be written to: {error}") from error

    def get(self, request: dict[str, Any]) -> str | None:
        """The answer to `request`, a JSON object; None for an unknown request and for a damaged file."""
        try:
            record = json.loads(self._file(request).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        answer = record.get("answer") if isinstance(record, dict) else None
        return answer if isinstance(answer, str) else None

    def put(self, request: dict[str, Any], answer: str) -> None:
        """Store `answer`, with the request beside it for human readers."""
        file = self._file(request)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{uuid4().hex}.partial")
        partial.write_text(json.dumps({"asked": request, "answer": answer}), encoding="utf-8")
        partial.replace(file)

    def _file(self, request: dict[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self._folder / key[:2] / f"{key[2:]}.json"
