"""docs/preferences.md: its configurations are valid, its rows are read, its filters are all there are."""

import re
from pathlib import Path

import pytest

from configs.data import ComparisonData
from configs.load import load_config
from configs.preferences import PairFilters
from configs.stages import STAGES
from pipeline.data.comparisons import read_comparisons
from pipeline.data.rows import BadRows

PAGE = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```(?:yaml|json) (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.endswith(".yaml")])
def test_the_configurations_are_valid(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(BLOCKS[name], encoding="utf-8")
    stage = name.removesuffix(".yaml")
    assert load_config(str(tmp_path / name), [], STAGES[stage]).config.type == stage


@pytest.mark.parametrize("form", ["pair", "dialogue", "scored", "ranking"])
def test_the_rows_are_read(form: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(BLOCKS[form], encoding="utf-8")
    source = {"type": "file", "paths": [str(tmp_path / "rows.jsonl")]}
    bad_rows = BadRows()
    comparisons = list(read_comparisons(ComparisonData.model_validate({"source": source, "form": form}), bad_rows))
    assert not bad_rows.counts
    for comparison in comparisons:
        assert comparison.messages == [{"role": "user", "content": "2+2?"}] and comparison.answers == ["4", "5"]


def test_every_filter_is_explained() -> None:
    explained = re.search(r"## Filters.*?## Figures", PAGE, re.DOTALL)
    assert explained and not [name for name in PairFilters.model_fields if f"`{name}`" not in explained[0]]
