"""What judges have said, kept on disk by what they were asked.

A file for each vote, written to a name of its own and renamed, so that any number of processes may use one folder, on a
shared file system too: two that ask the same at once write the same place, and the later answer stays.
"""

import hashlib
import json
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4


class AnswerCache:
    """A folder of answers. Raises ValueError where it can't be made or written to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cache='{folder}' can't be written to: {error}") from error

    def get(self, asked: dict[str, Any]) -> str | None:
        """The answer to `asked`, a JSON object; None where there is none, or a file that is not whole."""
        try:
            kept = json.loads(self._file(asked).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        answer = kept.get("answer") if isinstance(kept, dict) else None
        return answer if isinstance(answer, str) else None

    def put(self, asked: dict[str, Any], answer: str) -> None:
        """Keep `answer`, and the question beside it for people to read."""
        file = self._file(asked)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{uuid4().hex}.partial")
        partial.write_text(json.dumps({"asked": asked, "answer": answer}), encoding="utf-8")
        partial.replace(file)

    def _file(self, asked: dict[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return self._folder / key[:2] / f"{key[2:]}.json"
