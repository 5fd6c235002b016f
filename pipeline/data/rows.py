"""Read rows from any source, and record the bad ones.

Bad rows are counted by reason, and the first of each reason are recorded with file and line. Above a configured share
of bad rows the run stops with a summary.
"""

import codecs
import gzip
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from configs.data import DatasetSource, FileSource, GymSource, HubSource, MixtureSource, Source, SumsSource
from configs.references import PREFIX
from pipeline.data.order import order
from pipeline.data.sums import draw_sums
from pipeline.disk.files import write_atomic
from pipeline.disk.remote import fetch_file, is_address, remote_versions

_EXAMPLES_PER_REASON = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `where` is its file and line, or its data set and number; `values` are its columns."""

    where: str
    values: dict[str, Any]

    def column(self, name: str) -> Any:
        """Return the value of a column. Raises BadRowError if it is missing, null, or not finite."""
        value = self.values.get(name)
        if value is None:
            raise BadRowError("missing field", f"'{name}' is not among {sorted(self.values)}"[:120])
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRowError("not a finite number", f"'{name}' is {value}")
        return value


class BadRowError(Exception):
    """The reason that a row is counted under, and the detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class BadRow:
    """An example of a bad row for the report."""

    where: str
    reason: str
    detail: str


@dataclass(slots=True)
class BadRows:
    """The record of bad rows; `seen` counts all rows.

    `doubts` counts good rows that look wrong, by reason, and `doubtful` is the first row of each reason. `forms` counts
    the rows that were read by their columns, without a setting that names these, and those of each part of a mixture.
    """

    seen: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)
    doubts: Counter[str] = field(default_factory=Counter)
    doubtful: list[BadRow] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, error: BadRowError) -> None:
        """Count a bad row, and record it if it is among the first of its reason."""
        self.counts[error.reason] += 1
        if self.counts[error.reason] <= _EXAMPLES_PER_REASON:
            self.examples.append(BadRow(where, error.reason, error.detail))

    def doubt(self, where: str, reason: str, detail: str) -> None:
        """Count a row that is used although it looks wrong."""
        self.doubts[reason] += 1
        if self.doubts[reason] == 1:
            self.doubtful.append(BadRow(where, reason, detail))

    def summary(self) -> str:
        """Return `3 of 1000 rows are bad: 2 not JSON, 1 too long` with a line for each example and doubt."""
        lines: list[str] = []
        if self.counts or not (self.doubts or self.forms):
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common()) or "none"
            lines.append(f"{self.counts.total()} of {self.seen} rows are bad: {reasons}")
        lines += [f"  {row.where}: {row.reason}{f' ({row.detail})' if row.detail else ''}" for row in self.examples]
        for row in self.doubtful:
            lines.append(f"{self.doubts[row.reason]} of {self.seen} rows: {row.reason}; {row.where}: {row.detail}")
        lines += [f"{count} of {self.seen} rows are read as {form}" for form, count in self.forms.items()]
        return "\n".join(lines)

    def check(self, max_bad_share: float) -> None:
        """Raise ValueError with the summary if more than this share of the rows is bad, or no row is good."""
        if self.seen == 0:
            raise ValueError("the source has no rows")
        if self.counts.total() > max_bad_share * self.seen or self.counts.total() == self.seen:
            raise ValueError(f"{self.summary()}\nrepair the rows, or raise max_bad_share={max_bad_share}")

    def state(self) -> dict[str, Any]:
        """Return the record as JSON values, for `from_state`."""
        return _STATE.dump_python(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "BadRows":
        """Restore the record from `state`."""
        return _STATE.validate_python(state)

    def write(self, path: Path) -> None:
        """Write the examples as JSON lines, atomically."""
        write_atomic(path, "".join(json.dumps(asdict(row)) + "\n" for row in self.examples))


_STATE = TypeAdapter(BadRows)


def report_bad_rows(bad_rows: BadRows, file: Path, report: Callable[[str], None]) -> None:
    """Call `report` with the summary of bad, doubtful and recognised rows, if any, and write the bad ones to `file`."""
    if bad_rows.counts or bad_rows.doubts or bad_rows.forms:
        report(bad_rows.summary())
    if bad_rows.counts:
        bad_rows.write(file)


def check_characters(text: str) -> None:
    """Raise BadRowError for half of a surrogate pair, which neither tokenizers nor UTF-8 files accept."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError("half a surrogate pair", f"character {error.start}") from error


def read_rows(source: Source | MixtureSource, bad_rows: BadRows) -> Iterator[Row]:
    """Yield the rows of `source` in order; unreadable lines go to `bad_rows`, which counts every row.

    Raises ValueError for an unreadable source: no such file, data set or task, or a broken archive.

    Example: `[row.values for row in read_rows(FileSource(type="file", paths=["chat.jsonl"]), BadRows())]`
    """
    for where, values in _mixed(source, bad_rows) if isinstance(source, MixtureSource) else _rows_of(source):
        bad_rows.seen += 1
        if isinstance(values, BadRowError):
            bad_rows.add(where, values)
        else:
            yield Row(where, values)


def _mixed(source: MixtureSource, bad_rows: BadRows) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    """Yield the rows of a mixture, a source after the other. The sources are read twice, the first time to count."""
    counts = {name: sum(1 for _ in _rows_of(part.source)) for name, part in source.sources.items()}
    for name, count in counts.items():
        if not count:
            raise ValueError(f"source.sources.{name} has no rows; give it some, or remove it from the mixture")
    whole = min(counts[name] / part.share for name, part in source.sources.items())
    for name, part in source.sources.items():
        number = max(1, min(counts[name], round(part.share * whole)))
        chosen = {*order(counts[name], source.seed, 0)[:number].tolist()}
        bad_rows.forms[f"the part '{name}' of the mixture, which has {counts[name]}"] += number
        yield from (row for index, row in enumerate(_rows_of(part.source)) if index in chosen)


def _rows_of(source: Source) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    match source:
        case FileSource():
            for path in source_files(source):
                yield from _file(str(path), path)
            for address, version in remote_files(source).items():
                yield from _file(address, fetch_file(address, version))
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


def check_files(source: Source | MixtureSource) -> None:
    """Raise ValueError for a path or an address of a source without a file, and for files of another type."""
    source_files(source)
    remote_files(source)


def source_files(source: Source | MixtureSource) -> list[Path]:
    """Return the files of a source, sorted and without repeats: of its paths, glob patterns or folders.

    Sources without files, addresses, and outputs of earlier stages that don't exist yet, have none. Raises ValueError
    for a path without a file, and for files of another type.
    """
    if isinstance(source, MixtureSource):
        return sorted({file for part in source.sources.values() for file in source_files(part.source)})
    if isinstance(source, DatasetSource):
        folders = [Path(folder) for folder in source.paths if not folder.startswith(PREFIX)]
        return sorted(file for folder in folders for file in _dataset_files(folder))
    files: set[Path] = set()
    for pattern in source.paths if isinstance(source, FileSource) else []:
        if is_address(pattern):
            continue
        matches = _matches(Path(pattern).expanduser())
        if not matches:
            raise ValueError(f"source.paths: no file fits '{pattern}' (looked from {Path.cwd()})")
        files.update(matches)
    _refuse_other_types(map(str, files))
    return sorted(files)


def remote_files(source: Source | MixtureSource) -> dict[str, str]:
    """Return the files behind the addresses of a source, sorted, each with a text that changes with its content.

    Raises ValueError for an address without a file, and for files of another type.
    """
    if isinstance(source, MixtureSource):
        return {name: text for part in source.sources.values() for name, text in remote_files(part.source).items()}
    paths = source.paths if isinstance(source, FileSource) else []
    found = {name: text for path in paths if is_address(path) for name, text in remote_versions(path).items()}
    _refuse_other_types(found)
    return dict(sorted(found.items()))


def _refuse_other_types(names: Iterable[str]) -> None:
    for name in names:
        if not name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise ValueError(
                f"source.paths: '{name}' is not a .jsonl, .jsonl.gz or .parquet file; docs/sft.md has lines that "
                "convert JSON and CSV"
            )


def _matches(path: Path) -> list[Path]:
    """Return the files and folders of a path or glob pattern.

    Leading parts that exist are taken literally, so `data[1].jsonl` matches the file of that name.
    """
    base, *rest = (Path(path.anchor), *path.relative_to(path.anchor).parts)
    while rest and (base / rest[0]).exists():
        base /= rest.pop(0)
    return list(base.glob("/".join(rest))) if rest else [base]


def _file(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    return _parquet(name, path) if path.suffix == ".parquet" else _json_lines(name, path)


def _json_lines(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRowError]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(codecs.BOM_UTF8)  # `cat` of several files puts it in the middle too
                if text.strip():
                    yield f"{name}:{number}", _parse(text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"'{name}' is a broken gzip archive ({error}); fetch it again") from error


def _parse(text: bytes) -> dict[str, Any] | BadRowError:
    try:
        values = json.loads(text.decode("utf-8"))
        if b"\\u" in text:  # only an escape can be half a surrogate pair
            check_characters(json.dumps(values, ensure_ascii=False))
    except UnicodeDecodeError as error:
        return BadRowError("not UTF-8", f"byte {error.start}: {error.reason}")
    except (ValueError, RecursionError) as error:  # ValueError also for an integer of thousands of digits
        return BadRowError("not JSON", str(error))
    except BadRowError as error:
        return error
    if not isinstance(values, dict):
        return BadRowError("not an object", f"a {type(values).__name__}")
    return values


def _parquet(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile  # training ranks read no rows, so they need neither this nor `datasets`

    try:
        # Not by `datasets`, which writes to its cache in the home even for a file here.
        rows = (row for batch in ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from _numbered(name, rows)
    except ValueError as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"'{name}' is not a readable Parquet file: {error}") from error


def _hub(source: HubSource) -> Iterator[dict[str, Any]]:
    import datasets

    several = isinstance(source.name, list)
    for name in source.name if isinstance(source.name, list) else [source.name]:
        try:
            rows: Any = datasets.load_dataset(source.path, name, split=source.split, revision=source.revision)
        except (ConnectionError, FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"the hub gives no data set '{source.path}' (name={name}, split={source.split}, "
                f"revision={source.revision}); check the spelling and the network ({error})"
            ) from error
        yield from ({"subject": name, **row} for row in rows) if several else rows


def _dataset_files(folder: Path) -> list[Path]:
    files = list(folder.glob("*/*.arrow"))
    if not files:
        raise ValueError(f"source.paths: '{folder}' holds no data set that was saved to disk")
    return files


def _dataset(folder: Path, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    _dataset_files(folder)
    splits: Any = datasets.load_from_disk(str(folder))
    if not isinstance(splits, datasets.DatasetDict) or split not in splits:
        names = sorted(splits) if isinstance(splits, datasets.DatasetDict) else "one data set, without splits"
        raise ValueError(f"source.split='{split}': '{folder}' has {names}")
    rows: Any = splits[split]
    return rows


def _gym(source: GymSource) -> Iterator[dict[str, Any]]:
    """Yield rows with prompt, truth, answer, and metadata for the task's own verifier: name, arguments and entry.

    truth and answer are None for tasks without a single answer.
    """
    import reasoning_gym  # takes two seconds, so import it only for this source
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
