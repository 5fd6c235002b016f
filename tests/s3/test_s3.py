"""A run whose data, model and results lie in S3, against a server of `moto` on this machine: `make test-s3` runs it."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipeline.disk.ending import Ending
from pipeline.reports.report import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ranks,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (find_spec("moto") and find_spec("s3fs")), reason="`make test-s3` installs s3fs and moto"),
]
RECIPE = """
name: {name}
runs_dir: {runs}
copy_to: s3://results/runs
stages:
  sft:
    type: sft
    model: {model}
    data: {{source: {{type: file, paths: ["s3://corpus/part-*.jsonl"]}}, max_length: 64}}
    conversations_per_step: 8
    steps: 2
    optimizer: {{learning_rate: 1e-3}}
    trainer: {{threads: 1}}
"""


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with the buckets `corpus`, which has rows, and `results`."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "ALIGNYARD_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    client = s3fs.S3FileSystem(skip_instance_cache=True)
    for bucket in ("corpus", "results"):
        client.mkdir(bucket)
    for part in range(2):
        rows = [{"prompt": f"{part}{i}+1=", "completion": str(10 * part + i + 1)} for i in range(10)]
        client.pipe(f"corpus/part-{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    yield client
    server.stop()


def run(folder: Path, name: str, model: str) -> int:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(name=name, runs=folder / "runs", model=model))
    return main(["run", str(recipe)])


def test_data_model_and_results_lie_in_s3(
    s3: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "first", "{init_config: tiny}") == Ending.DONE
    there = {
        name.removeprefix("results/runs/first/"): info["size"] for name, info in s3.find("results", detail=True).items()
    }
    assert {
        "run.json",
        "report.html",
        "sft/figures.json",
        "sft/hf/config.json",
        "sft/hf/model.safetensors",
    } <= there.keys()
    assert not any("checkpoints" in name for name in there)
    here = tmp_path / "runs" / "first"
    assert all(size == (here / name).stat().st_size for name, size in there.items() if name != "run.log")

    first = "s3://results/runs/first/sft/hf"
    assert run(tmp_path, "second", f'{{path: "{first}"}}') == Ending.DONE
    losses = [read_metrics(tmp_path / "runs" / name / "sft")[0]["loss/total"] for name in ("first", "second")]
    assert losses[1] < losses[0]

    s3.pipe("corpus/part-1.jsonl", b'{"prompt": "1+1=", "completion": "2"}\n')
    (tmp_path / "runs" / "second" / "sft" / "figures.json").unlink()
    capfd.readouterr()
    assert run(tmp_path, "second", f'{{path: "{first}"}}') == Ending.WRONG_INPUT
    output = "".join(capfd.readouterr())
    assert "have changed since" in output and "s3://corpus/part-1.jsonl" in output

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert run(tmp_path, "third", "{init_config: tiny}") == Ending.WRONG_INPUT
    assert "can't be reached or was refused" in "".join(capfd.readouterr())
