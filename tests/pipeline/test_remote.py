"""Files behind addresses; `file://` stands in for S3, which tests/s3 has (`make test-s3`)."""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from configs.data import FileSource
from configs.model import ModelConfig
from pipeline.data.rows import check_files, read_rows, remote_files, source_files
from pipeline.disk.remote import copy_folder, fetch_checkpoint, fetch_file, remote_versions
from pipeline.weights.resolve import resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNYARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket"
    folder.mkdir()
    for number in (1, 2):
        (folder / f"part-{number}.jsonl").write_text(json.dumps({"prompt": f"question {number}"}) + "\n")
    return folder


def rows(*paths: str) -> dict[str, Any]:
    from pipeline.data.rows import BadRows

    return {row.where: row.values for row in read_rows(FileSource(type="file", paths=list(paths)), BadRows())}


def test_rows_behind_an_address_are_named_by_it(bucket: Path) -> None:
    address = f"file://{bucket}"
    found = rows(f"{address}/part-*.jsonl")
    assert found == {f"{address}/part-{number}.jsonl:1": {"prompt": f"question {number}"} for number in (1, 2)}


def test_an_object_is_fetched_once_and_again_after_it_changed(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"file://{bucket}/part-1.jsonl"
    fetched: list[str] = []
    system = type(fsspec.filesystem("file"))
    original = system.get_file
    monkeypatch.setattr(system, "get_file", lambda self, *a, **k: (fetched.append(a[0]), original(self, *a, **k)))
    first = rows(address)
    assert rows(address) == first and len(fetched) == 1
    (bucket / "part-1.jsonl").write_text('{"prompt": "changed"}\n')
    os.utime(bucket / "part-1.jsonl", (1, 1))
    assert rows(address)[f"{address}:1"] == {"prompt": "changed"} and len(fetched) == 2


def test_the_version_of_a_source_changes_with_its_objects(bucket: Path) -> None:
    source = FileSource(type="file", paths=[f"file://{bucket}/*.jsonl"])
    before = remote_files(source)
    assert source_files(source) == [] and len(before) == 2 and remote_files(source) == before
    (bucket / "part-2.jsonl").write_text("{}\n")
    assert [name for name in before if remote_files(source)[name] != before[name]] == [f"file://{bucket}/part-2.jsonl"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("file:///none/*.jsonl", "no object fits 'file:///none/"),
        ("s4://bucket/x.jsonl", "s4"),
        ("gs://bucket/x.jsonl", "gcsfs"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_before_a_start(address: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_files(FileSource(type="file", paths=[address]))


def test_other_types_of_files_are_refused(bucket: Path) -> None:
    (bucket / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"rows\.csv' is not a \.jsonl"):
        check_files(FileSource(type="file", paths=[f"file://{bucket}/rows.csv"]))


def test_a_fetch_that_is_cut_short_leaves_nothing(bucket: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("reset by peer")

    address = f"file://{bucket}/part-1.jsonl"
    [version] = remote_versions(address).values()
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("file")), "get_file", cut)
        with pytest.raises(ValueError, match="ConnectionError: reset by peer"):
            fetch_file(address, version)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert fetch_file(address, version).read_bytes() == (bucket / "part-1.jsonl").read_bytes()


def test_a_checkpoint_is_fetched_without_what_lies_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "optimizer.bin"):
        (source / name).write_text("{}")
    folder = resolve_model(ModelConfig(path=f"file://{source}"), workdir=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        fetch_checkpoint(f"file://{source}/")


def test_a_copy_sends_what_is_new_and_a_checkpoint_is_complete_or_has_no_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, there = tmp_path / "stage", tmp_path / "there"
    for name in ("hf/config.json", "hf/model.safetensors", "checkpoints/step-3/state", "figures.json", ".lock"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text(name)
    system = type(fsspec.filesystem("file"))
    original, sent, broken = system.put_file, list[str](), [True]

    def put(self: Any, source: str, place: str, **_: Any) -> None:
        if broken[0] and place.endswith("model.safetensors"):
            raise ConnectionError("no route")
        sent.append(Path(place).name)
        original(self, source, place)

    monkeypatch.setattr(system, "put_file", put)
    with pytest.raises(ValueError, match="no route"):
        copy_folder(stage, f"file://{there}", leaving="checkpoints")
    assert not (there / "hf" / "config.json").exists()
    broken[0] = False
    assert copy_folder(stage, f"file://{there}", leaving="checkpoints") == 2
    assert sent == ["figures.json", "model.safetensors", "config.json"]
    assert copy_folder(stage, f"file://{there}", leaving="checkpoints") == 0
    (stage / "figures.json").write_text("longer than before")
    assert copy_folder(stage, f"file://{there}", leaving="checkpoints") == 1
