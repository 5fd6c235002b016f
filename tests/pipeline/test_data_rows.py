"""Rows out of files, gym tasks and sums: every kind of bad row is counted with its place, none is fatal alone."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from configs.data import ConversationData, DatasetSource, FileSource, GymSource, MixtureSource, SumsSource
from pipeline.data.rows import BadRowError, BadRows, Row, read_rows, report_bad_rows, source_files
from pipeline.data.sums import draw_sums, is_held_out_sum, worked_answer


def read(*paths: Path | str) -> tuple[list[Row], BadRows]:
    bad_rows = BadRows()
    rows = list(read_rows(FileSource(type="file", paths=[str(path) for path in paths]), bad_rows))
    return rows, bad_rows


def test_bad_lines_are_counted_by_reason_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [b'{"a": 1}', b"", b'{"a": "\xff"}', b'{"a": ', b"[1]", b'{"a": "\xc3\xa9"}', b"{'a': 1}", b"[" * 100_000]
    file.write_bytes(b"\n".join(lines))
    rows, bad_rows = read(file)
    assert [(row.where, row.values) for row in rows] == [(f"{file}:1", {"a": 1}), (f"{file}:6", {"a": "\u00e9"})]
    assert bad_rows.seen == 7, "a blank line is no row"
    assert bad_rows.counts == {"not UTF-8": 1, "not JSON": 3, "not an object": 1}
    places = {row.where.rpartition(":")[2]: row.reason for row in bad_rows.examples}
    assert places == {"3": "not UTF-8", "4": "not JSON", "5": "not an object", "7": "not JSON", "8": "not JSON"}


def test_formats_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"n": 2}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"n": 3}\n')
    Dataset.from_list([{"n": 0, "m": [{"role": "user"}]}, {"n": 1, "m": []}]).to_parquet(tmp_path / "a.parquet")
    rows, bad_rows = read(tmp_path / "*.jsonl*", tmp_path / "b.jsonl", tmp_path / "a.parquet")
    assert [row.values["n"] for row in rows] == [0, 1, 2, 3], "sorted by name, each file once"
    assert [Path(row.where).name for row in rows] == ["a.parquet:1", "a.parquet:2", "b.jsonl:1", "c.jsonl.gz:1"]
    assert rows[0].values["m"] == [{"role": "user"}]
    assert (bad_rows.seen, bad_rows.counts) == (4, {})


def mixture(folder: Path, seed: int = 0, **parts: tuple[int, float]) -> MixtureSource:
    """A mixture of files, each with so many rows and this share."""
    for name, (rows, _) in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(f'{{"n": "{name} {row}"}}\n' for row in range(rows)))
    sources = {
        name: {"source": {"type": "file", "paths": [str(folder / f"{name}.jsonl")]}, "share": share}
        for name, (_, share) in parts.items()
    }
    return ConversationData.model_validate({"source": {"type": "mixture", "sources": sources, "seed": seed}}).source


def test_a_mixture_has_its_shares_and_is_the_same_at_every_start(tmp_path: Path) -> None:
    source, bad_rows = mixture(tmp_path, math=(300, 0.5), chat=(1000, 0.3), code=(60, 0.2)), BadRows()
    rows = [row.values["n"] for row in read_rows(source, bad_rows)]
    counts = {name: sum(row.startswith(name) for row in rows) for name in ("math", "chat", "code")}
    assert counts == {"math": 150, "chat": 90, "code": 60}, "the scarcest source, code, is taken whole"
    assert len({*rows}) == 300 == bad_rows.seen
    assert "90 of 300 rows are read as the part 'chat' of the mixture, which has 1000" in bad_rows.summary()
    assert [row.values["n"] for row in read_rows(source, BadRows())] == rows
    other = mixture(tmp_path, seed=1, math=(300, 0.5), chat=(1000, 0.3), code=(60, 0.2))
    drawn = [row.values["n"] for row in read_rows(other, BadRows())]
    assert len(drawn) == 300 and drawn != rows
    assert [file.stem for file in source_files(source)] == ["chat", "code", "math"]


def test_a_mixture_that_is_no_whole_or_lacks_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'math': 0\.5, 'chat': 0\.3.* add up to 0\.8"):
        mixture(tmp_path, math=(3, 0.5), chat=(3, 0.3))
    with pytest.raises(ValueError, match=r"source\.sources\.chat has no rows"):
        list(read_rows(mixture(tmp_path, math=(3, 0.5), chat=(0, 0.5)), BadRows()))
    with pytest.raises(ValueError, match="at least 2"):
        mixture(tmp_path, math=(3, 0.5))


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": "\\ud83d"}', "half a surrogate pair"),
        (b'{"n": {"deep": ["\\udc00 low first"]}}', "half a surrogate pair"),
        (b'{"\\ude42\\ud83d": 1}', "half a surrogate pair"),
        (b'{"n": "\\ud83d\\ude42"}', None),
        (b'{"n": "\\\\ud83d"}', None),
        (b'{"n": "\xf0\x9f\x99\x82 \\u0000"}', None),
        (BOM + b'{"n": 1}', None),
        (b'{"n": "' + BOM + b'"}', None),
        (BOM, "blank"),
        (b" \t\r", "blank"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b'{"n": "\xed\xa0\xbd"}', "not UTF-8"),
        (b'{"n": ' + b"7" * 5000 + b"}", "not JSON"),
        (b'{"n": NaN}', None),
        (b'{"n": 1} {"n": 2}', "not JSON"),
        (b'{"n": 1},', "not JSON"),
        (b"null", "not an object"),
        (b"NaN", "not an object"),
        (b'"text"', "not an object"),
        (b"7", "not an object"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_one_bad_line_never_stops_a_load(tmp_path: Path, line: bytes, reason: str | None, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    content = b'{"n": 0}\n' + line + b'\r\n{"n": 3}\n'
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    rows, bad_rows = read(file)
    assert [rows[0].values, rows[-1].values] == [{"n": 0}, {"n": 3}]
    assert len(rows) == (3 if reason is None else 2)
    assert bad_rows.counts == ({} if reason in (None, "blank") else {reason: 1})
    assert [row.where for row in bad_rows.examples] == [f"{file}:2"] * len(bad_rows.examples)


@pytest.mark.parametrize("name", ["data[1].jsonl", "a*b.jsonl", "who?.jsonl", "[!a].jsonl", "x[1].parquet"])
@pytest.mark.parametrize("folder", ["plain", "run[2]", "s*r"])
def test_a_path_is_a_path_whatever_is_in_its_name(tmp_path: Path, folder: str, name: str) -> None:
    file = tmp_path / folder / name
    file.parent.mkdir()
    if file.suffix == ".parquet":
        Dataset.from_list([{"n": 1}]).to_parquet(file)
    else:
        file.write_text('{"n": 1}\n')
    (tmp_path / folder / "data1.jsonl").write_text('{"n": 2}\n')
    for path in (file, file.parent / f"*{file.suffix}"):
        rows, _ = read(path)
        assert (str(file), 1) in [(row.where.rpartition(":")[0], row.values["n"]) for row in rows]
    assert len(read(file)[0]) == 1
    assert len(read(tmp_path / "*" / "data[0-9].jsonl")[0]) == 1


def test_a_data_set_in_a_folder_with_brackets(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]" / "data"
    DatasetDict({"train": Dataset.from_list([{"n": 1}])}).save_to_disk(folder)
    source = DatasetSource(type="dataset", paths=[str(folder)])
    assert [row.values for row in read_rows(source, BadRows())] == [{"n": 1}]
    assert source_files(source)


def test_a_number_that_is_none_is_bad() -> None:
    for number in (float("nan"), float("inf")):
        with pytest.raises(BadRowError, match="not a finite number"):
            Row("f:1", {"n": number}).column("n")
    assert Row("f:1", {"n": 0.0}).column("n") == 0.0


def test_doubts_are_told_beside_bad_rows(tmp_path: Path) -> None:
    reports: list[str] = []
    account = BadRows(seen=3)
    report_bad_rows(account, tmp_path / "none.jsonl", reports.append)
    account.doubt("f:1", "odd", "this")
    account.doubt("f:2", "odd", "that")
    report_bad_rows(account, tmp_path / "none.jsonl", reports.append)
    assert reports == ["2 of 3 rows: odd; f:1: this"]
    assert not list(tmp_path.iterdir())
    account.check(max_bad_share=0.0)
    account.add("f:3", BadRowError("bad"))
    assert account.summary().splitlines() == ["1 of 3 rows are bad: 1 bad", "  f:3: bad", "2 of 3 rows: odd; f:1: this"]
    assert BadRows.from_state(json.loads(json.dumps(account.state()))) == account


def test_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*nothing\*\.jsonl'"):
        read(tmp_path / "nothing*.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows\.csv' .*\.jsonl"):
        read(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="gzip"):
        read(tmp_path / "rows.jsonl.gz")
    (tmp_path / "rows.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="Parquet"):
        read(tmp_path / "rows.parquet")


def test_missing_and_null_columns_are_bad() -> None:
    row = Row("f:1", {"a": None, "b": 0})
    assert row.column("b") == 0
    for name in ("a", "c"):
        with pytest.raises(BadRowError, match="missing field"):
            row.column(name)


def bad_account(bad: int, seen: int) -> BadRows:
    bad_rows = BadRows(seen=seen)
    for number in range(bad):
        bad_rows.add(f"f.jsonl:{number}", BadRowError("not JSON", "here"))
    return bad_rows


def test_share_of_bad_rows_that_stops_a_run() -> None:
    bad_account(bad=1, seen=100).check(0.01)
    with pytest.raises(ValueError, match=r"2 of 100 rows.*2 not JSON\n  f\.jsonl:0"):
        bad_account(bad=2, seen=100).check(0.01)
    with pytest.raises(ValueError, match="3 of 3 rows"):
        bad_account(bad=3, seen=3).check(1.0)
    with pytest.raises(ValueError, match="no rows"):
        BadRows().check(1.0)


def test_report_keeps_the_first_of_each_reason(tmp_path: Path) -> None:
    bad_rows = bad_account(bad=50, seen=100)
    bad_rows.add("f.jsonl:99", BadRowError("too long"))
    bad_rows.write(tmp_path / "bad_rows.jsonl")
    written = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in written] == [*(f"f.jsonl:{number}" for number in range(5)), "f.jsonl:99"]
    assert BadRows.from_state(json.loads(json.dumps(bad_rows.state()))) == bad_rows
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad_rows.jsonl"]


def test_gym_rows_carry_what_their_verifier_needs() -> None:
    import reasoning_gym

    source = GymSource(type="reasoning_gym", task="chain_sum", size=5, seed=3, params={"min_terms": 2, "max_terms": 2})
    bad_rows = BadRows()
    rows = list(read_rows(source, bad_rows))
    assert [row.where for row in rows] == [f"reasoning_gym/chain_sum:{number}" for number in range(1, 6)]
    assert rows == list(read_rows(source, BadRows())), "the same rows for the same seed"
    for row in rows:
        assert row.values["truth"] == row.values["answer"]
        metadata = row.values["metadata"]
        assert metadata["task"] == "chain_sum"
        assert reasoning_gym.get_score_answer_fn("chain_sum")(row.values["truth"], metadata["entry"]) == 1.0


def test_unknown_gym_task_and_parameter() -> None:
    with pytest.raises(ValueError, match=r"near: .*'chain_sum'"):
        list(read_rows(GymSource(type="reasoning_gym", task="chain_sums", size=1), BadRows()))
    with pytest.raises(ValueError, match="'chain_sum'"):
        list(read_rows(GymSource(type="reasoning_gym", task="chain_sum", size=1, params={"terms": 2}), BadRows()))


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        (58, 13, "8+3=11;5+1+1=7;71"),
        (25, 38, "5+8=13;2+3+1=6;63"),
        (12, 34, "2+4=6;1+3=4;46"),
        (95, 38, "5+8=13;9+3+1=13;133"),
        (50, 60, "0+0=0;5+6=11;110"),
        (7, 5, "7+5=12;12"),
        (999, 111, "9+1=10;9+1+1=11;9+1+1=11;1110"),
        (109, 201, "9+1=10;0+0+1=1;1+2=3;310"),
    ],
)
def test_worked_sums(first: int, second: int, answer: str) -> None:
    assert worked_answer(first, second) == answer


def sums(split: str, size: int, seed: int = 0, digits: int = 2, programs: float = 0.0) -> list[dict[str, object]]:
    values = {"type": "sums", "size": size, "seed": seed, "digits": digits, "split": split}
    return list(draw_sums(SumsSource.model_validate(values | {"shares": {"programs": programs}})))


def test_sums_columns() -> None:
    for row in sums("train", 20):
        first, second = str(row["prompt"]).removesuffix("=").split("+")
        assert row["truth"] == str(int(first) + int(second))
        assert str(row["answer"]).endswith(f";{row['truth']}")
        assert row["messages"] == [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        assert len(first) == len(second) == 2


def test_programs_among_sums() -> None:
    rows = sums("train", 400, programs=0.25)
    programs = [row for row in rows if row["reward"] == "code"]
    assert 60 < len(programs) < 140
    assert {row["reward"] for row in rows} == {"math", "code"}
    for row in programs:
        first, second = str(row["prompt"]).removeprefix("py ").split("+")
        assert row["answer"] == f"print({first}+{second})"
        stdout = f"{int(first) + int(second)}\n"
        assert row["truth"] == {"language": "python", "cases": [{"stdin": "", "stdout": stdout}]}
    assert all(row["reward"] == "code" for row in sums("held_out", 9, programs=1.0))


def test_held_out_sums_are_a_tenth_and_never_trained_on() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    held_out = {f"{a}+{b}=" for a, b in pairs if is_held_out_sum(a, b)}
    assert 0.09 < len(held_out) / len(pairs) < 0.11
    assert not held_out & {row["prompt"] for row in sums("train", 5000)}
    drawn = [row["prompt"] for row in sums("held_out", len(held_out))]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) == held_out
    with pytest.raises(ValueError, match=f"only {len(held_out)} sums of 2 digits"):
        sums("held_out", len(held_out) + 1)


def test_the_split_is_the_same_for_ever() -> None:
    held_out = [(a, b) for a in range(10, 14) for b in range(10, 30) if is_held_out_sum(a, b)]
    assert held_out == [(10, 23), (10, 27), (11, 18), (11, 24), (12, 12), (12, 17), (12, 26)]


def test_sums_depend_on_the_seed_alone() -> None:
    assert sums("train", 50, seed=1) == sums("train", 50, seed=1)
    assert sums("train", 50, seed=1) != sums("train", 50, seed=2)
    assert sums("held_out", 50, seed=1) != sums("held_out", 50, seed=2)
    assert sums("train", 20) == sums("train", 50)[:20], "more rows begin with the same rows"
    assert all(len(str(row["prompt"])) == len("123456+123456=") for row in sums("held_out", 50, digits=6))


def test_a_saved_data_set_is_read_split_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    rows = [{"prompt": "a", "truth": None}, {"prompt": "b", "truth": "2"}]
    DatasetDict(train=Dataset.from_list(rows), held_out=Dataset.from_list(rows[:1])).save_to_disk(str(folder))
    both = DatasetSource(type="dataset", paths=[str(folder), str(folder)])
    bad_rows = BadRows()
    assert [row.values for row in read_rows(both, bad_rows)] == rows + rows
    held_out = DatasetSource(type="dataset", paths=[str(folder)], split="held_out")
    assert [row.where for row in read_rows(held_out, bad_rows)] == [f"{folder}/held_out:1"]
    assert {file.parent.name for file in source_files(held_out)} == {"train", "held_out"}


def test_a_folder_without_the_split_or_the_data_set_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    DatasetDict(train=Dataset.from_list([{"prompt": "a"}])).save_to_disk(str(folder))
    with pytest.raises(ValueError, match=r"source\.split='test': .*'train'"):
        list(read_rows(DatasetSource(type="dataset", paths=[str(folder)], split="test"), BadRows()))
    with pytest.raises(ValueError, match="saved to disk"):
        source_files(DatasetSource(type="dataset", paths=[str(tmp_path / "nothing")]))
