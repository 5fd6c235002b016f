"""Addition on paper, column by column from the right, as the answers and thoughts of sums work it out."""

from collections.abc import Iterator, Mapping


def added_columns(first: int, second: int, mistakes: Mapping[int, int] | None = None) -> Iterator[tuple[str, int]]:
    """Yield the summands and the total of each column of two numbers with as many digits: `8+3`, 11; `5+1+1`, 7.

    mistakes: amounts that are added to the totals of columns, by column from the right.
    """
    carry = 0
    for column, (a, b) in enumerate(zip(reversed(str(first)), reversed(str(second)), strict=True)):
        total = int(a) + int(b) + carry + (mistakes or {}).get(column, 0)
        yield f"{a}+{b}{'+1' if carry else ''}", total
        carry = total // 10
