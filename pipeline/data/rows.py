"""Rows out of any source, and an account of the bad ones.

A bad row never ends a run by itself and never disappears: it is counted by reason, the first of each reason are kept
with file and line, and past a configured share the run stops and says why.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets

from configs.data import DatasetSource, FileSource, GymSource, HubSource, Source, SumsSource
from configs.references import PREFIX
from pipeline.data.sums import draw_sums
from pipeline.folder import write_atomic

EXAMPLES_PER_REASON = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `where` is its file and line, or its data set and number; `values` its columns."""

    where: str
    values: dict[str, Any]

    def column(self, name: str) -> Any:
        """The value of a column. Raises BadRowError when it is missing or null."""
        if self.values.get(name) is None:
            raise BadRowError("missing field", f"'{name}' is not among {sorted(self.values)}"[:120])
        return self.values[name]


class BadRowError(Exception):
    """What is wrong with a row: the reason it is counted under, and the detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class BadRow:
    """An example for the report."""

    where: str
    reason: str
    detail: str


@dataclass(slots=True)
class BadRows:
    """The account: `seen` counts all rows, good and bad."""

    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)

    def add(self, where: str, error: BadRowError) -> None:
        """Counts a bad row, and keeps it as an example if it is among the first of its reason."""
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= EXAMPLES_PER_REASON:
            self.examples.append(BadRow(where, error.reason, error.detail))

    def summary(self) -> str:
        """`3 of 1000 rows are bad: 2 not JSON, 1 too long`, then a line for each example."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common()) or "none"
        lines = [f"{self.counts.total()} of {self.seen} rows are bad: {reasons}"]
        lines += [f"  {row.where}: {row.reason}{f' ({row.detail})' if row.detail else ''}" for row in self.examples]
        return "\n".join(lines)

    def check(self, max_bad_share: float) -> None:
        """Raises ValueError, with the summary, when more than this share of the rows is bad or no good row is left."""
        if self.seen == 0:
            raise ValueError("the source has no rows")
        if self.counts.total() > max_bad_share * self.seen or self.counts.total() == self.seen:
            raise ValueError(f"{self.summary()}\nrepair the rows, or raise max_bad_share={max_bad_share}")

    def state(self) -> dict[str, Any]:
        """All of it as JSON can hold it, for `from_state`."""
        return {"seen": self.seen, "counts": dict(self.counts), "examples": [asdict(row) for row in self.examples]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "BadRows":
        """The account that `state` was taken of."""
        examples = [BadRow(**example) for example in state["examples"]]
        return cls(state["seen"], Counter(state["counts"]), examples)

    def write(self, path: Path) -> None:
        """Writes the examples as JSON lines, as a whole."""
        write_atomic(path, "".join(json.dumps(asdict(row)) + "\n" for row in self.examples))


def tell(bad_rows: BadRows, file: Path, say: Callable[[str], None]) -> None:
    """Bad rows are said and kept in `file`, never just dropped."""
    if bad_rows.counts:
        say(bad_rows.summary())
        bad_rows.write(file)


def read_rows(source: Source, bad_rows: BadRows) -> Iterator[Row]:
    """The rows of `source` in its order; unreadable lines go to `bad_rows`, which also counts every row.

    Raises ValueError when the source itself can't be read: no such file, data set or task, or a broken archive.
    """
    for where, values in _rows_of(source):
        bad_rows.seen += 1
        if isinstance(values, BadRowError):
            bad_rows.add(where, values)
        else:
            yield Row(where, values)


def _rows_of(source: Source) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    match source:
        case FileSource():
            for path in source_files(source):
                yield from _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
        case HubSource():
            yield from _numbered(f"{source.path}/{source.split}", _hub(source))
        case GymSource():
            yield from _numbered(f"reasoning_gym/{source.task}", _gym(source))
        case SumsSource():
            yield from _numbered(f"sums/{source.split}", draw_sums(source))
        case DatasetSource():
            for path in source.paths:
                yield from _numbered(f"{path}/{source.split}", _dataset(Path(path), source.split))


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, values in enumerate(rows, start=1):
        yield f"{name}:{number}", values


def source_files(source: Source) -> list[Path]:
    """The files that a source is read from, sorted, each once: those that its paths and glob patterns name, or what
    lies in its folders. None for a source without files, and for what an earlier stage has yet to make."""
    if isinstance(source, DatasetSource):
        made = [Path(folder) for folder in source.paths if not folder.startswith(PREFIX)]
        return sorted(file for folder in made for file in _dataset_files(folder))
    found: set[Path] = set()
    for pattern in source.paths if isinstance(source, FileSource) else []:
        path = Path(pattern).expanduser()
        matches = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise ValueError(f"source.paths: no file fits '{pattern}' (looked from {Path.cwd()})")
        found.update(matches)
    for path in found:
        if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise ValueError(f"source.paths: '{path}' is not a .jsonl, .jsonl.gz or .parquet file")
    return sorted(found)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"'{path}' is a broken gzip archive ({error}); fetch it again") from error


def _parse(line: bytes) -> dict[str, Any] | BadRowError:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRowError("not UTF-8", f"byte {error.start}: {error.reason}")
    except (json.JSONDecodeError, RecursionError) as error:
        return BadRowError("not JSON", str(error))
    if not isinstance(values, dict):
        return BadRowError("not an object", f"a {type(values).__name__}")
    return values


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _numbered(str(path), rows)
    except ValueError as error:  # what pyarrow's errors are
        raise ValueError(f"'{path}' is not a readable Parquet file: {error}") from error


def _hub(source: HubSource) -> Iterator[dict[str, Any]]:
    try:
        rows: Any = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"the hub gives no data set '{source.path}' (name={source.name}, split={source.split}, "
            f"revision={source.revision}); check the spelling and the network ({error})"
        ) from error
    yield from rows


def _dataset_files(folder: Path) -> list[Path]:
    files = list(folder.glob("*/*.arrow"))
    if not files:
        raise ValueError(f"source.paths: '{folder}' holds no data set that was saved to disk")
    return files


def _dataset(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    _dataset_files(folder)
    splits: Any = datasets.load_from_disk(str(folder))
    if not isinstance(splits, datasets.DatasetDict) or split not in splits:
        found = sorted(splits) if isinstance(splits, datasets.DatasetDict) else "one data set, without splits"
        raise ValueError(f"source.split='{split}': '{folder}' has {found}")
    rows: Any = splits[split]
    return rows


def _gym(source: GymSource) -> Iterator[dict[str, Any]]:
    """Columns prompt, truth, answer, and metadata with what the task's own verifier needs: name, arguments and entry.

    Some tasks have no single answer; truth and answer are None there.
    """
    import reasoning_gym  # two seconds, for this source only
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        near = get_close_matches(source.task, DATASETS, n=3)
        raise ValueError(f"source.task='{source.task}': reasoning_gym has no such task; near: {near}")
    try:
        tasks = reasoning_gym.create_dataset(source.task, seed=source.seed, size=source.size, **source.params)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"source.params={source.params} do not suit the task '{source.task}': {error!r}") from error
    for entry in tasks:
        yield {
            "prompt": entry["question"],
            "truth": entry["answer"],
            "answer": entry["answer"],
            "metadata": {"task": source.task, "entry": entry, "params": source.params},
        }
