"""The program inside a completion: tags, fences, thinking, and text written to confuse."""

import pytest

from rewards.code.extract import program
from tests.bounds import processor_seconds


@pytest.mark.parametrize(
    ("completion", "source"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("Sure!\n```py\nprint(1)\n```\nIt prints 1.", "print(1)\n"),
        ("```Python3\nprint(1)\n```", "print(1)\n"),
        ("``` python title=a.py\nprint(1)\n```", "print(1)\n"),
        ("```{.python}\nprint(1)\n```", "print(1)\n"),
        ("```python\nfirst\n```\nNo:\n```python\nsecond\n```", "second\n"),
        ("```python\nprint(1)\n```\nwhich prints\n```\n1\n```", "print(1)\n"),  # the tag that fits wins
        ("```\nprint(1)\n```\nwhich prints\n```text\n1\n```", "print(1)\n"),  # then no tag
        ("```cpp\nint x;\n```", "int x;\n"),  # then any: the compiler will say
        ("~~~python\nprint('```')\n~~~", "print('```')\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("1. Write\n   ```python\n   print(1)\n   ```", "   print(1)\n"),
        ("```python\nprint(1)", "print(1)"),  # cut off
        ("```python", None),
        ("<think>```python\nwrong\n```</think>\n```python\nright\n```", "right\n"),
        ("<think>```python\nwrong\n```</think>\n", None),
        ("", None),
        (" \n\t", None),
        ("```python\n\n```", None),
        ("```python\nf()\n```\n```python\n```", None),
    ],
)
def test_the_program(completion: str, source: str | None) -> None:
    assert program(completion, "python") == source


def test_tags_are_the_languages() -> None:
    completion = "```js\nlet x\n```\n```c++\nint x;\n```\n```sh\nls\n```\n```rs\nfn main() {}\n```\n"
    assert program(completion, "cpp") == "int x;\n"
    assert program(completion, "javascript") == "let x\n"
    assert program(completion, "bash") == "ls\n"
    assert program(completion, "rust") == "fn main() {}\n"


@pytest.mark.parametrize(
    "pattern", ["```", "```\n", "`", "~~~ \n", "> ", "```py\n", "</think>", "\n", " ", "``` x\n~~~\n"]
)
def test_extraction_is_fast_on_200_kilobytes_of_anything(pattern: str) -> None:
    with processor_seconds(10):
        program(pattern * (200_000 // len(pattern)), "python")
