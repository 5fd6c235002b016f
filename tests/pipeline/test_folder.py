"""Files appear complete: their bytes reach the disk before their name does."""

import os
from pathlib import Path

import pytest

from pipeline.disk.files import new_folder, read_json, write_atomic


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Syncs and renames in order, by file name."""
    seen: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def record_fsync(descriptor: int) -> None:
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def record(call):
        def renamed(path: Path, target: Path) -> Path:
            seen.append(("rename", path.name))
            return call(path, target)

        return renamed

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record(replace))
    monkeypatch.setattr(Path, "rename", record(rename))
    return seen


def test_a_file_reaches_the_disk_before_its_name(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    write_atomic(tmp_path / "run.json", "{}")
    assert events == [("sync", ".run.json.partial"), ("rename", ".run.json.partial"), ("sync", tmp_path.name)]


def test_a_folder_reaches_the_disk_with_all_below_it_before_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    with new_folder(tmp_path / "step-3") as partial:
        (partial / "one").write_text("1")
        (partial / "below").mkdir()
        (partial / "below" / "two").write_text("2")
    place = events.index(("rename", ".step-3.partial"))
    assert {name for _, name in events[:place]} == {"one", "two", "below", ".step-3.partial"}
    assert events[place + 1 :] == [("sync", tmp_path.name)]


@pytest.mark.parametrize(
    ("content", "wrong"), [("", "is empty"), ('{"a": 1', "is damaged"), ("[1]", "no JSON object"), ("\0\0", "damaged")]
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, content: str, wrong: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json' .*{wrong}.*; remove it"):
        read_json(tmp_path / "x.json", "remove it")


def test_a_whole_file_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x.json", '{"a": [1]}')
    assert read_json(tmp_path / "x.json", "") == {"a": [1]}
    with pytest.raises(ValueError, match=r"y\.json' is missing; run it again"):
        read_json(tmp_path / "y.json", "run it again")
