"""A whole run as it lies on disk, made up: what the tests of reports and lineage look at."""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from configs.gate import HoldRule, ImproveRule, ThresholdRule
from pipeline.disk.ending import Ending
from pipeline.disk.files import write_json_lines
from pipeline.disk.lock import locked
from pipeline.disk.run_record import RunRecord, StageRecord, State
from pipeline.gates.decision import Decision, write_decision
from pipeline.gates.rules import Ruling
from pipeline.reports.recipe_page import write_recipe_html
from pipeline.reports.stage_page import write_html

HOSTILE = (
    "</pre></td></svg><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&\u202e"
)

STAGES = {
    "sft": ("sft", []),
    "pairs": ("preferences", ["sft"]),
    "rm_helpful": ("rm", ["sft", "pairs"]),
    "reason": ("grpo", ["sft"]),
    "gate_reason": ("gate", ["reason", "sft"]),
    "prefer": ("grpo", ["gate_reason", "rm_helpful"]),
    "eval": ("eval", ["prefer"]),
}
STATES = {"prefer": State.RUNNING, "eval": State.WAITING}


def make_run(run: Path, steps: int = 30) -> Path:
    """Every type of stage once; its GRPO still goes on, and hostile text stands wherever a model or a person wrote."""
    rng = random.Random(0)
    for place, (name, (kind, parents)) in enumerate(STAGES.items()):
        if name != "eval":
            _start(run, name, kind, parents, place)
    _training(run / "sft", {"loss/nll_mean": lambda t: 3 * math.exp(-3 * t)}, steps, rng)
    load = {f"model.layers.{layer}.mlp.gate": [0, 90, 30, 10, 30, 20, 0, 60] for layer in (1, 2)}
    (run / "sft" / "expert_load.json").write_text(json.dumps({"step": steps, "gates": load}))
    _training(run / "rm_helpful", {"reward_model/accuracy": lambda t: 0.5 + 0.4 * t}, steps, rng)
    _reward_model(run / "rm_helpful")
    _pairs(run / "pairs")
    for name in ("reason", "prefer"):
        _training(run / name, GRPO, steps, rng)
        _rollouts(run / name / "rollouts", steps)
    (run / "prefer" / "figures.json").unlink()
    _gate(run / "gate_reason")
    stages = {
        name: StageRecord(
            kind,
            parents,
            state=STATES.get(name, Ending.DONE.word),
            reason="waits for prefer" if name == "eval" else "",
            started=None if name == "eval" else time.time() - 700 + 100 * place,
            ended=None if name in STATES else time.time() - 605 + 100 * place,
        )
        for place, (name, (kind, parents)) in enumerate(STAGES.items())
    }
    RunRecord(run.name, str(run), stages, State.RUNNING, reason=HOSTILE, started=time.time() - 700).write()
    return run


def write_run_page(run: Path) -> str:
    """Write the run's page as its conductor does, which holds the folder, and return it."""
    with locked(run):
        write_recipe_html(RunRecord.read(run))
    return (run / "report.html").read_text()


def write_stage_page(folder: Path) -> str:
    write_html(folder)
    return (folder / "report.html").read_text()


GRPO = {
    "reward/total/mean": lambda t: 0.3 + 0.5 * t,
    "reward/math/mean": lambda t: 0.3 + 0.6 * t,
    "reward/helpful/mean": lambda t: -0.2 + 0.4 * t,
    "reward/math/pass_rate": lambda t: 0.3 + 0.6 * t,
    "reward/math/outcome/right_rate": lambda t: 0.3 + 0.6 * t,
    "reward/math/outcome/wrong_rate": lambda t: 0.7 - 0.6 * t,
    "reward/math/failure_rate": lambda t: 0.01,
    "reward/math/abstain_rate": lambda t: 0.0,
    "reward_pool/rule/utilisation": lambda t: 0.4,
    "rollout/length/mean": lambda t: 40 + 10 * t,
    "rollout/truncated_rate": lambda t: 0.05,
    "rollout/entropy_mean": lambda t: 1.2 - 0.6 * t,
    "rollout/tokens_per_second": lambda t: 2900.0,
    "reward/total/left_out_rate": lambda t: 0.0,
    "loss/kl_mean": lambda t: 0.02 * t,
    "loss/surprisal_mean": lambda t: 1.1 - 0.5 * t,
    "mismatch/abs_mean": lambda t: 1e-6,
    "mismatch/abs_max": lambda t: 3e-5,
    "sync/gap_max": lambda t: 2e-5,
}


def _start(run: Path, name: str, kind: str, parents: list[str], place: int) -> None:
    folder = run / name
    folder.mkdir(parents=True)
    sha256 = f"{place}" * 64
    model = {
        "folder": "../base",
        "head": "LlamaForCausalLM",
        "tokenizer": sha256,
        "chat_template": sha256,
        "files": {"config.json": sha256, "model.safetensors": sha256},
    }
    lineage = {
        "stage": name,
        "type": kind,
        "created": f"2026-01-01T00:00:{place:02d}+00:00",
        "versions": {"torch": "2.13.0"},
        "config": sha256,
        "models": {"model": model},
        "data": {"data.source": {"rows.jsonl": sha256}},
        "rewards": {"math": sha256} if kind == "grpo" else {},
        "parents": [{"key": "model.path", "folder": f"../{parent}", "lineage": sha256} for parent in parents],
    }
    (folder / "lineage.json").write_text(json.dumps(lineage))
    config: dict[str, Any] = {"type": kind, "note": HOSTILE}
    if kind == "grpo":
        config = {
            "type": "grpo",
            "model": {"path": "base"},
            "prompts": {"source": {"type": "sums", "size": 10}},
            "rewards": [{"name": "math"}],
            "steps": 30,
            "prompts_per_step": 2,
            "group_size": 2,
            "sampling": {"max_tokens": 8},
            "optimizer": {"learning_rate": 1e-3},
            "rollout": {"max_model_len": 1024},
        }
    (folder / "config.json").write_text(json.dumps(config))


def _training(folder: Path, curves: dict[str, Any], steps: int, rng: random.Random) -> None:
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        row = {key: curve(step / steps) * rng.uniform(0.93, 1.07) for key, curve in curves.items()}
        phases = {f"time/{phase}_seconds": rng.uniform(1, 2) for phase in ("generate", "train", "sync")}
        row |= phases | {"time/step_seconds": sum(phases.values()) + 0.2, "train/grad_norm": rng.uniform(0.5, 1)}
        rows.append({"step": step, "train/learning_rate": 1e-3} | row)
    write_json_lines(folder / "metrics.jsonl", rows)
    (folder / "figures.json").write_text(json.dumps(rows[-1]))


def _rollouts(folder: Path, steps: int) -> None:
    folder.mkdir()
    for step in range(1, steps + 1):
        records: list[dict[str, Any]] = []
        for prompt in ("12+30=", f"{step}+1=", HOSTILE):
            for score in (1.0, 0.0, None):
                failed = {"score": None, "status": "timeout", "outcome": "", "detail": f"5 s are over {HOSTILE}"}
                judged = {"score": score, "status": "ok", "outcome": "right" if score else "wrong", "detail": HOSTILE}
                answer = "2+0=2;1+3=4;42" if step > 1 else f"I am not sure. {HOSTILE}"
                verdicts = {"math": failed if score is None else judged}
                records.append(
                    {
                        "prompt": prompt,
                        "completion": answer,
                        "finish_reason": "stop",
                        "reward": score,
                        "verdicts": verdicts,
                    }
                )
        write_json_lines(folder / f"step-{step:06d}.jsonl", records)


def _reward_model(folder: Path) -> None:
    figures: dict[str, float] = json.loads((folder / "figures.json").read_text())
    for key, value in {"accuracy": 0.82, "accuracy/source/hh": 0.86, "accuracy/source/ours": 0.75}.items():
        figures |= {
            f"eval/held_out/{key}{end}": value + by for end, by in (("", 0.0), ("_low", -0.07), ("_high", 0.05))
        }
    figures["eval/held_out/length_correlation"] = 0.11
    (folder / "figures.json").write_text(json.dumps(figures))
    (folder / "evaluation").mkdir()
    bins = [
        {"low": 0.5 + p / 20, "high": 0.55 + p / 20, "pairs": 12 * (10 - p), "confidence": c, "accuracy": c * 0.97}
        for p in range(10)
        for c in [0.525 + p / 20]
    ]
    write_json_lines(folder / "evaluation" / "held_out.reliability.jsonl", bins)


def _pairs(folder: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"{n}+1= {HOSTILE}"}],
            "answers": [str(n + 1), f"{n} {HOSTILE}"],
            "scores": [1.0, 0.0],
            "source": "sums",
            "domain": "math",
            "row": f"sums:{n}",
        }
        for n in range(8)
    ]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder / "data")
    figures = {"given": 51.0, "kept": 8.0, "held_out": 0.0, "dropped": 43.0, "margin": 1.0}
    figures |= {"dropped/share_of_its_domain": 40.0, "dropped/near-duplicate": 3.0}
    figures |= {"domain/math/given": 51.0, "domain/math/kept": 8.0}
    figures |= {"sampled/sums/prompts": 60.0, "sampled/sums/without_pair": 9.0}
    figures |= {"sampled/sums/without_pair/all_right": 9.0}
    (folder / "figures.json").write_text(json.dumps(figures))


def _gate(folder: Path) -> None:
    rulings = [
        Ruling(
            ImproveRule(type="improve", figure="sums/pass@1_greedy", margin=0.02),
            0.8,
            0.5,
            0.3,
            0.21,
            0.38,
            "holds",
            200,
        ),
        Ruling(HoldRule(type="hold", figure="sums/mean_length", tolerance=8), 44.0, 40.0, 4.0, 2.0, 6.0, "holds", 200),
        Ruling(
            ThresholdRule(type="threshold", figure="sums/truncated_rate", at_most=0.1),
            0.09,
            None,
            None,
            0.05,
            0.14,
            "undecided",
            200,
            samples_needed=900,
        ),
    ]
    write_decision(folder, Decision("promote", rulings, {}, promoted="../reason/hf"))
    (folder / "figures.json").write_text("{}")
    for name, right in (("parent", 0.5), ("candidate", 0.8)):
        (folder / name).mkdir()
        figures = {
            "sums": {"pass@1_greedy": right, "pass@1_greedy_low": right - 0.06, "pass@1_greedy_high": right + 0.05}
        }
        (folder / name / "evaluation.json").write_text(json.dumps(figures))
        records = [
            {
                "index": n,
                "row": f"sums:{n}",
                "prompt": f"{n}+{n}= {HOSTILE if n == 0 else ''}",
                "truth": str(2 * n),
                "completion": str(2 * n) if n < 10 * right else f"{n} {HOSTILE}",
                "mode": "greedy",
                "score": float(n < 10 * right),
                "status": "ok",
                "outcome": "right" if n < 10 * right else "wrong",
                "detail": "",
            }
            for n in range(10)
        ]
        write_json_lines(folder / name / "sums.jsonl", records)
