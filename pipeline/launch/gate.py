"""A gate, put together: checkpoints, engines, evaluations kept and made, the decision and what comes of it."""

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from configs.gate import GateConfig
from configs.model import ModelConfig
from configs.stages import Recipe
from pipeline.cluster.start import start_all, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.disk.files import link
from pipeline.errors import DecisionNeeded, RunStopped
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.decision import Decision, Verdict, asked, read_decision, rules_table, write_decision
from pipeline.gates.kept import Compared, kept, model_hash
from pipeline.models.tokenizer import load_tokenizer
from pipeline.stages import gate
from pipeline.weights.resolve import check_template, resolve_model

SHORT = 16


def check(config: GateConfig) -> None:
    """Raise ValueError for a template, source, text or reward that isn't there."""
    for model in (config.candidate, config.parent):
        check_template(model)
    check_suites(config.suites, config.reward_pool)


def launch(config: GateConfig, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    """Decide in `folder`; the figures of both, named `candidate/SUITE/FIGURE` and `parent/SUITE/FIGURE`.

    Raises RunStopped where the verdict is to stop, DecisionNeeded where it is to ask.
    """
    console = Console()
    models = checkpoints(config, folder)
    templates = {"candidate": config.candidate, "parent": config.parent, "best": config.candidate}
    hashes = {name: model_hash(model, templates[name]) for name, model in models.items()}
    if hashes.get("best") == hashes["candidate"]:  # the last step was the best: nothing to roll back to
        del models["best"], hashes["best"]
    hashes["suites"] = Compared.of(folder).suites
    evaluations = (folder.parent if recipe else folder) / "evaluations"
    figures: dict[str, float] = {}

    def evaluate(name: str) -> Mapping[str, SuiteResult] | None:
        if name not in models:
            return None
        place = evaluations / f"{hashes[name][:SHORT]}-{hashes['suites'][:SHORT]}"
        if not place.is_dir():
            console.print(f"[dim]evaluating the {name}: {os.path.relpath(models[name], folder)}")
        results = kept(place, lambda into: _evaluate(config, templates[name], models[name], into))
        link(folder / name, place)
        for suite, result in results.items():
            figures.update({f"{name}/{suite}/{figure}": value for figure, value in result.figures.items()})
        return results

    places = {name: os.path.relpath(model, folder) for name, model in models.items()}
    decision = gate.run(config, evaluate, places, hashes, _decided(folder, hashes))
    write_decision(folder, decision)
    _tell(decision, console)
    _act(decision, folder)
    return figures


def checkpoints(config: GateConfig, folder: Path) -> dict[str, Path]:
    """The folders of `candidate` and `parent`, and of `best` where the candidate's stage kept one."""
    models = {name: resolve_model(model, workdir=folder) for name, model in _pair(config).items()}
    best = models["candidate"].parent / "best" / "hf"
    return models | ({"best": best.resolve()} if best.is_dir() else {})


def _pair(config: GateConfig) -> dict[str, ModelConfig]:
    return {"candidate": config.candidate, "parent": config.parent}


def _evaluate(config: GateConfig, settings: ModelConfig, model: Path, folder: Path) -> Mapping[str, SuiteResult]:
    """One checkpoint on the gate's suites, with engines of its own: the next may have another architecture."""
    tokenizer = load_tokenizer(model, settings.chat_template)
    evaluation = Evaluation.prepare(config.suites, tokenizer, config.reward_pool, config.seed)
    ends, dtype = turn_ends(tokenizer), settings.dtype
    with start_all(lambda: start_rollout(model, config.rollout, dtype=dtype, seed=config.seed, ends=ends)) as (
        rollout,
    ):
        return evaluation.run(rollout, config.sampling, config.seed, folder)


def _decided(folder: Path, hashes: Mapping[str, str]) -> Verdict | None:
    """What the user decided, if it was about what the gate has before it now."""
    decision = read_decision(folder)
    about = decision is not None and decision.decided_by == "user" and decision.hashes == hashes
    return decision.verdict if decision and about else None


def _tell(decision: Decision, console: Console) -> None:
    console.print(rules_table(decision.rulings))
    if decision.best:
        console.print("the best checkpoint that the stage kept:")
        console.print(rules_table(decision.best))
    onwards = f"; what follows starts from {decision.promoted}" if decision.promoted else ""
    by = " (the user's decision)" if decision.decided_by == "user" else ""
    console.print(f"[bold]{decision.verdict.replace('_', ' ')}[/]{by}{onwards}")


def _act(decision: Decision, folder: Path) -> None:
    """Let what follows start from the promoted checkpoint, or say why nothing follows."""
    if decision.promoted is not None:
        link(folder / "hf", folder / decision.promoted)
        return
    said = f"`alignyard gate decide {folder.parent} {folder.name} promote|stop|roll_back`"
    outcomes = {outcome: [asked(r.rule) for r in decision.rulings if r.outcome == outcome] for outcome in _OPEN}
    why = "; ".join(f"{outcome}: {', '.join(rules)}" for outcome, rules in outcomes.items() if rules)
    if decision.verdict == "ask":
        raise DecisionNeeded(f"gate '{folder.name}' can't decide ({why}). Decide by {said}, then run the recipe again")
    if decision.decided_by == "user":
        raise RunStopped(f"gate '{folder.name}' stops the run, as was decided")
    raise RunStopped(f"gate '{folder.name}' stops the run ({why}). To overrule it: {said}")


_OPEN = ("fails", "undecided")
