"""`report.html` of a stage: one page that needs nothing else, rewritten while the stage runs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.grpo import GRPOConfig
from pipeline.disk.recorded import CONFIG, LINEAGE, read_figures
from pipeline.gates.decision import DECISION
from pipeline.reports.alarms import Alarms
from pipeline.reports.curves import STEP_SECONDS, curves, headline, last_figures
from pipeline.reports.files import EXPERT_LOAD, Row, duration, read_json, read_metrics
from pipeline.reports.page import Markup, folded, pill, section, table, tag, write_page
from pipeline.reports.results import comparisons, evaluation, gate, reward_model
from pipeline.reports.samples import samples
from pipeline.reports.shapes import heat_map

REPORT = "report.html"
HASH_SHOWN = 12


def write_html(folder: Path) -> None:
    """Writes `report.html` from the files that a stage's folder holds by now; parts without a file are left out. Until
    the stage is done, a browser reloads the page every now and then."""
    rows, final, lineage = read_metrics(folder), read_figures(folder), read_json(folder / LINEAGE)
    run, stage, kind = folder.resolve().parent.name, folder.resolve().name, lineage.get("type", "")
    done, figures, decided = final is not None, final or {}, (folder / DECISION).is_file()
    state = pill("done", "good") if done else "" if decided else pill("running or stopped", "busy")
    parts = [
        _heading(run, stage, kind, rows, state),
        *_alarms(folder, kind, rows),
        headline(rows),
        *_results(folder, kind, figures),
        *curves(rows),
        _expert_load(folder),
        *samples(folder),
        section("Lineage", *lineage_part(lineage)),
        section("Settings and figures", _document(folder / CONFIG), _document(folder / LINEAGE), last_figures(rows)),
    ]
    write_page(folder / REPORT, f"{stage} of {run}", *parts, reload=not (done or decided))


def lineage_part(lineage: Mapping[str, Any]) -> Iterator[Markup]:
    """What a stage was made from: models and data with their hashes, and the stages that made them."""
    if not lineage:
        return
    parents = {parent["key"]: parent["folder"] for parent in lineage["parents"]}
    rows = [
        (
            key,
            [_parent(parents.get(f"{key}.path")), model["head"]],
            short(weights_hash(model)),
            short(model["tokenizer"]),
        )
        for key, model in lineage["models"].items()
    ]
    if rows:
        yield table(("model", "made by", "weights", "tokenizer"), rows)
    files = [(key, name, short(sha256)) for key, name, sha256 in data_hashes(lineage)]
    files += [("reward", name, short(sha256)) for name, sha256 in lineage["rewards"].items()]
    if files:
        yield table(("taken", "", "sha256"), files)
    yield folded("Versions", table(("package", "version"), lineage["versions"].items()))


def data_hashes(lineage: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key, file and hash of each file that a stage read; of sources without files, the hash of their settings."""
    for key, hashed in lineage["data"].items():
        if isinstance(hashed, str):
            yield key, "(its settings)", hashed
        else:
            yield from ((key, name, sha256) for name, sha256 in hashed.items())


def short(sha256: str) -> Markup:
    """The beginning of a hash, the whole of it under the pointer."""
    return tag("code", sha256[:HASH_SHOWN], title=sha256)


def weights_hash(model: Mapping[str, Any]) -> str:
    """Hash of the first file of a model's weights."""
    weights = [sha256 for name, sha256 in model["files"].items() if name != "config.json"]
    return weights[0] if weights else ""


def _parent(folder: str | None) -> list[Markup | str]:
    return [tag("a", Path(folder).name, href=f"{folder}/{REPORT}"), ", "] if folder else []


def _heading(run: str, stage: str, kind: str, rows: Sequence[Row], state: str) -> Markup:
    steps = f"{rows[-1]['step']:g} steps" if rows else ""
    seconds = sum(row.get(STEP_SECONDS, 0.0) for row in rows)
    facts = [part for part in (kind, steps, duration(seconds) if seconds else "") if part]
    return tag(
        "header",
        tag("a", run, href=f"../{REPORT}"),
        tag("h1", stage, " ", state),
        tag("p", " · ".join(facts), class_="sub"),
    )


def _alarms(folder: Path, kind: str, rows: Sequence[Row]) -> list[Markup]:
    """What the run's alarms have said, and at which step."""
    if kind != "grpo" or not rows:
        return []
    said: list[Markup] = []
    step = 0
    config = GRPOConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    alarms = Alarms(
        config.model_copy(update={"stop_on": []}),
        lambda text: said.append(tag("p", f"Step {step}: {text.strip().removeprefix('alarm: ')}", class_="notice")),
    )
    for row in rows:
        step = int(row["step"])
        alarms.check(step, row)
    return said


def _results(folder: Path, kind: str, figures: Mapping[str, float]) -> list[Markup]:
    match kind:
        case "eval":
            return [evaluation(figures)]
        case "rm":
            return [reward_model(folder, figures)]
        case "gate":
            return gate(folder)
        case "preferences" | "sample":
            return comparisons(folder, figures)
        case _:
            return []


def _expert_load(folder: Path) -> Markup:
    """Where the tokens of a step went, layer by layer."""
    load = read_json(folder / EXPERT_LOAD)
    if not load:
        return Markup()
    rows = {
        f"layer {number[1]}" if (number := re.search(r"\.(\d+)\.", gate)) else gate: [
            count * len(counts) / sum(counts) for count in counts
        ]
        for gate, counts in load["gates"].items()
        if any(counts)
    }
    about = f"Tokens sent to each expert in step {load['step']}, against the mean of its layer."
    return section("Load of experts", heat_map("Load of experts", rows), about=about)


def _document(file: Path) -> Markup:
    return folded(file.name, tag("pre", file.read_text(encoding="utf-8"))) if file.is_file() else Markup()
