"""Extracting a program: tags, fences, thinking, and misleading text."""
# ruff: noqa: E501  completions on one line

import pytest

from rewards.code.extract import extract_program
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
        ("1. Write\n   ```python\n   print(1)\n   ```", "print(1)\n"),
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
    assert extract_program(completion, "python") == source


def test_tags_are_the_languages() -> None:
    completion = "```js\nlet x\n```\n```c++\nint x;\n```\n```sh\nls\n```\n```rs\nfn main() {}\n```\n"
    assert extract_program(completion, "cpp") == "int x;\n"
    assert extract_program(completion, "javascript") == "let x\n"
    assert extract_program(completion, "bash") == "ls\n"
    assert extract_program(completion, "rust") == "fn main() {}\n"


@pytest.mark.parametrize(
    "pattern",
    ["```", "```\n", "`", "~~~ \n", "> ", "```py\n", "</think>", "\n", " ", "``` x\n~~~\n", "- ```\n", "'''\n```\n"],
)
def test_extraction_is_fast_on_200_kilobytes_of_anything(pattern: str) -> None:
    with processor_seconds(60):  # linear: 1 to 4 s, where quadratic time would be hours
        extract_program(pattern * (200_000 // len(pattern)), "python")


RIGHT, WRONG = "def f():\n    return 1", "def f():\n    return 2"
QUOTED = RIGHT.replace("\n", "\n> ")
INDENTED = RIGHT.replace("\n", "\n   ")
DOCUMENTED = """def f():
  \'\'\'Example:

  ```
  f()
  ```
  ```python
  f() == 1
  ```
  \'\'\'
  return 1"""
LAYOUTS = {
    "a closing fence alone": f"{RIGHT}\n```",
    "a closing fence alone, then prose": f"{RIGHT}\n```\nThis function returns one.",
    "a closing fence alone, then another block": f"{RIGHT}\n```\nExample:\n```\n>>> f()\n```",
    "a word, then a block": f"solution:\n```\n{RIGHT}\n```",
    "a name, then a block": f"python\n```\n{RIGHT}\n```",
    "a call in prose, then a block": f"now for f():\n```\n{RIGHT}\n```",
    "a heading, then a block": f"## solution\n\n```\n{RIGHT}\n```",
    "prose, then a closing fence alone": f"Here is the function you want:\n\n{RIGHT}\n```",
    "a closing fence alone, with tildes": f"{RIGHT}\n~~~\n",
    "fences in a docstring": f"```python\n{DOCUMENTED}\n```",
    "fences in a docstring, without a tag": f"```\n{DOCUMENTED}\n```\nDone.",
    "a fence in a string of the program": "```python\ndef f():\n    text = '```'\n    return len(text) - 2  # not ```\n```",
    "in a list item": f"1. First:\n\n   ```python\n   {INDENTED}\n   ```\n2. Then rest.",
    "in a bullet": f"* ```python\n  {RIGHT.replace(chr(10), chr(10) + '  ')}\n  ```",
    "in a nested list": f"- a\n  - b\n    ```python\n    {RIGHT.replace(chr(10), chr(10) + '    ')}\n    ```\n- c",
    "in a list item, as deep as code": f"- a\n\n        ```python\n        {RIGHT.replace(chr(10), chr(10) + ' ' * 8)}\n        ```",
    "in a list item, the code not indented": f"1. First:\n   ```python\n{RIGHT}\n   ```\n2. Then rest.",
    "in a quote": f"> As asked:\n> ```python\n> {QUOTED}\n> ```\nThat is it.",
    "in a quote within a quote": f">> ```python\n>> {RIGHT.replace(chr(10), chr(10) + '>> ')}\n>> ```",
    "glued to text before": f"The code: ```python\n{RIGHT}\n```",
    "glued to text before, without a tag": f"The code: ```\n{RIGHT}\n```",
    "glued to the code's end": f"```python\n{RIGHT}```",
    "glued to the code's end, another block after": f"```python\n{RIGHT}```\nPrints:\n```\n1\n```",
    "glued to text after": f"```python\n{RIGHT}\n``` It returns one.",
    "glued to text after, no blank": f"```python\n{RIGHT}\n```It returns one.",
    "glued to the code's beginning": f"```python {RIGHT}\n```",
    "tagged as an answer": f"<answer>\n```python\n{RIGHT}\n```\n</answer>",
    "tagged as an answer, glued": f"<answer>```python\n{RIGHT}```</answer>",
    "tagged as an answer, never closed": f"<answer>\n```python\n{RIGHT}\n</answer>",
    "tagged as an answer, without a fence": f"<answer>\n{RIGHT}\n</answer>",
    "tagged as an answer, another before and after": f"```python\n{WRONG}\n```\n<answer>\n```python\n{RIGHT}\n```\n</answer>\n"
    f"```python\n{WRONG}\n```",
    "behind a byte-order mark": f"\ufeff```python\n\ufeff{RIGHT}\n```",
    "behind a byte-order mark, without a fence": f"\ufeff{RIGHT}",
    "never closed before a corrected one": f"```python\n{WRONG}\n\nLet me fix that.\n```python\n{RIGHT}\n```",
    "never closed twice": f"```python\n{WRONG}\nNo.\n```python\n{WRONG}\nNo.\n```python\n{RIGHT}",
    "in Markdown of the same fence": f"```markdown\nSee:\n```python\n{RIGHT}\n```\n```",
    "tests after it": f"```python\n{RIGHT}\n```\nTests:\n```python\nassert f() == 1\n```\n```python\nprint(f())\n```",
    "an import before it": "```python\nimport math\n```\n```python\ndef f():\n    return math.floor(1.5)\n```",
    "a helper after it": "```python\ndef f():\n    return g()\n```\nwith\n```python\ndef g():\n    return 1\n```",
    "a helper's import": "```python\nimport math\n```\n```python\ndef g():\n    return math.floor(1.5)\n```\n"
    "```python\ndef f():\n    return g()\n```",
    "its last version": f"```python\n{WRONG}\n```\nBetter:\n```python\n{RIGHT}\n```",
    "an import without a tag": "```\nfrom math import floor\n```\n```python\ndef f():\n    return floor(1.5)\n```",
    "in lines of Windows": f"```python\n{RIGHT}\n```".replace("\n", "\r\n"),
    "a tag of thinking in the program": "```python\ndef f(text='a</think>b'):\n    return len(text.split('</think>')) - 1\n```",
    "tags of thinking in a string": f"```python\nTEXT = \"\"\"\n<think>\nhm\n</think>\n\"\"\"\n{RIGHT}\n```",
    "tags of thinking named in prose": f"```python\n{RIGHT}\n```\nIt drops what `<think>` and `</think>` enclose.",
    "a tag of thinking named without marks": f"Models open <think> first.\n```python\n{RIGHT}\n```\nSo up to </think> in it.",
    "after a thought about tags": f"<think>\nSplit at `</think>`.\n```python\n{WRONG}\n```\n</think>\n```python\n{RIGHT}\n```",
    "after a thought with an open fence": f"<think>\n```python\n{WRONG}\n</think>\n```python\n{RIGHT}\n```",
    "after a thought that the prompt opened": f"```python\n{WRONG}\n```\nFine.\n</think>\n```python\n{RIGHT}\n```",
}  # fmt: skip


def result(source: str | None) -> object:
    namespace: dict[str, object] = {}
    exec(source or "", namespace)
    return namespace["f"]()  # type: ignore[operator]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    assert result(extract_program(LAYOUTS[layout], "python", names=["f"])) == 1


@pytest.mark.parametrize(
    "completion",
    [
        f"<think>\n```python\n{RIGHT}\n```\n</think>\nI don't know.",
        f"<think>\n```python\n{RIGHT}\n```\nIs that all?",
        f"```python\n{RIGHT}\n```\n</think>\n```python\n{WRONG}\n```",
        f"```python\n{RIGHT}\n```\nBetter:\n```python\n{WRONG}\n```",
        f"```python\n{RIGHT}\n```\n<answer>\n```python\n{WRONG}\n```\n</answer>",
    ],
)
def test_a_right_program_elsewhere_earns_nothing(completion: str) -> None:
    source = extract_program(completion, "python", names=["f"])
    assert source is None or "return 1" not in source


def test_the_last_program_that_can_run_is_taken() -> None:
    completion = "```cpp\nint main() { return 0; }\n```\nThe change:\n```cpp\nint x;\n```"
    assert extract_program(completion, "cpp", runs=True) == "int main() { return 0; }\n"
    assert extract_program(completion, "cpp") == "int x;\n"
    parts = "```python\nimport sys\n```\n```python\nprint(sys.stdin.read())\n```\n```\n5\n```"
    assert extract_program(parts, "python", runs=True) == "import sys\n\nprint(sys.stdin.read())\n"
    draft = "```python\nprint(1)\n```\nNo:\n```python\nprint(2)\n```"
    assert extract_program(draft, "python", runs=True) == "print(2)\n"
