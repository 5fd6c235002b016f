"""docs/models.md says what the models do."""

from pathlib import Path

import pytest

from tests.pipeline import support
from tests.pipeline.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_has_every_family_and_nothing_else() -> None:
    rows = support.read_table(PAGE)
    assert list(rows) == list(FAMILIES)
    assert PAGE.read_text(encoding="utf-8") == support.table(rows)


def test_a_refusal_gives_its_reason() -> None:
    for family, cells in support.read_table(PAGE).items():
        for column, cell in cells.items():
            plain = cell in (support.YES, support.NOTHING, support.NOT_TRIED)
            assert plain or len(cell) > len("refused: "), f"{family}, {column}: {cell}"


@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "Gemma 2", "LFM2"])
def test_some_families_are_as_the_page_says(family: str) -> None:
    as_written(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_as_the_page_says(family: str) -> None:
    as_written(family)


def as_written(family: str) -> None:
    written = support.read_table(PAGE)[family]
    assert support.trained_cells(family) == {column: written[column] for column in support.TRAINED}


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.timeout(7200)
def test_engines_speak_as_the_page_says() -> None:
    written = {family: cells["GRPO"] for family, cells in support.read_table(PAGE).items()}
    tried = [family for family, cell in written.items() if cell not in (support.NOTHING, support.NOT_TRIED)]
    for family, cell in support.grpo_cells(tried):
        assert cell == written[family], family
