"""`alignyard config FILE`: a configuration as YAML that runs the same, each value with its origin."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import yaml
from rich.text import Text
from typer import Argument

from jobs.command import OUT, Overrides, verb_app
from jobs.start import load_any

app = verb_app()
ORIGIN_COLOURS = {"default": "dim", "override": "bold yellow"}
FILE_COLOUR = "green"
COMMENT_COLUMN = 56


@app.command()
def config(
    file: Annotated[str, Argument(metavar="FILE", help="A recipe, or the configuration of one stage.")],
    overrides: Overrides,
) -> int:
    """Print the whole configuration as YAML, with defaults. A comment names the origin of each value.

    An origin is a file, an override or the default. The output is a configuration that runs the same.

    \b
    Examples:
      alignyard config demo
      alignyard config demo stages.reason.steps=300 > longer.yaml
    """
    loaded = load_any(file, overrides)
    for line, key in _yaml_lines(loaded.config.model_dump(), ""):
        origin = loaded.origins.get(key)
        if origin is None:
            OUT.print(Text(line, style="bold"), soft_wrap=True)
        else:
            text = Text(f"{line:<{COMMENT_COLUMN}}  # {origin}", style=ORIGIN_COLOURS.get(origin, FILE_COLOUR))
            OUT.print(text, soft_wrap=True)
    return 0


def _yaml_lines(block: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """The lines of `block` as YAML, each with its dotted key. Nested lines are indented."""
    for name, value in block.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield f"{_scalar(name)}:", key
            yield from ((f"  {line}", inner) for line, inner in _yaml_lines(value, f"{key}."))
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            yield f"{_scalar(name)}:", key
            for index, entry in enumerate(value):
                for number, (line, inner) in enumerate(_yaml_lines(entry, f"{key}.{index}.")):
                    yield ("  " if number else "- ") + line, inner
        else:
            yield f"{_scalar(name)}: {_scalar(value)}", key


def _scalar(value: Any) -> str:
    """`value` on one line. `${` is escaped: references are resolved by now, so it is plain text."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text and "${" not in text else json.dumps(value).replace("${", r"\\${")
