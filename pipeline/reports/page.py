"""HTML pages from the Jinja2 templates beside this file.

Jinja2 escapes every value, so no text of a model becomes markup. The page's content policy forbids scripts other than
its own and everything that would have to be loaded: a page opens without a network, years later.
"""

import hashlib
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from configs.visible import visible
from pipeline.disk.ending import Ending
from pipeline.disk.files import write_atomic
from pipeline.disk.run_record import State
from pipeline.gates.decision import describe_rule, describe_ruling
from pipeline.reports.charts import interval_axis, svg_points
from pipeline.reports.files import duration, weights_hash
from pipeline.reports.results import figure_intervals, ruling_interval

REPORT = "report.html"
_COLORS = (
    dict.fromkeys((Ending.DONE.word, "promote"), "good")
    | dict.fromkeys((State.RUNNING, Ending.UNDECIDED.word, "ask"), "busy")
    | dict.fromkeys((Ending.FAULT.word, Ending.STOPPED.word, Ending.INTERRUPTED.word, State.KILLED), "bad")
    | dict.fromkeys(("stop", "roll_back"), "bad")
)
"""Colours of the states of stages and the verdicts of gates; the other states are grey."""
_MAX_CHARACTERS = 4000
"""Longest text of a sample that a page or a terminal shows."""


def write_page(file: Path, template: str, **values: Any) -> None:
    """Write the page `file`. Every template needs `title`, and `reload`: whether the browser is to load the page again
    every 20 seconds."""
    write_atomic(file, _ENVIRONMENT.get_template(template).render(values) + "\n")


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digits(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _short(value: float) -> str:
    """Three digits, in no more characters than fit beside an axis: `0.667`, `12,345`, `1.2e6`."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e5 else f"{value:.2g}".replace("e+0", "e")
    return f"{value:.3g}" if size >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def elide(text: str) -> str:
    """`text`, without its middle where it is too long to read."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]}\n … {len(text) - _MAX_CHARACTERS} characters left out …\n{text[-half:]}"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "color": lambda state: _COLORS.get(state, "idle"),
        "digits": _digits,
        "duration": duration,
        "elide": elide,
        "short": _short,
        "weights_hash": weights_hash,
    }
    script = environment.get_template("report.js").render().encode()
    environment.globals |= {
        "figure_intervals": figure_intervals,
        "interval_axis": interval_axis,
        "outcome_text": describe_ruling,
        "rule_text": describe_rule,
        "ruling_interval": ruling_interval,
        "script_hash": b64encode(hashlib.sha256(script).digest()).decode(),
        "svg_points": svg_points,
    }
    return environment


_ENVIRONMENT = _environment()
