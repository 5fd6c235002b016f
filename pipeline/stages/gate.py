"""A gate: compare candidate and parent on the same suites, and decide by rules if the candidate is promoted."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from configs.gate import GateConfig
from configs.model import ModelConfig
from pipeline.disk.files import link
from pipeline.errors import DecisionNeeded, RunStopped
from pipeline.evaluation.evaluate import check_suites
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.cache import cached_evaluation, model_hash, suites_hash
from pipeline.gates.decision import (
    Action,
    Decision,
    action_for,
    describe_rule,
    overall_outcome,
    read_decision,
    rules_table,
    write_decision,
)
from pipeline.gates.rules import apply_rule
from pipeline.stages import evaluate
from pipeline.stages.context import Context
from pipeline.weights.resolve import check_template, resolve_model

Results = Mapping[str, SuiteResult]

HASH_LENGTH = 16
"""Number of characters of each hash in the name of an evaluation's folder."""


def run(
    config: GateConfig,
    candidate: Results,
    parent: Results,
    evaluate_best: Callable[[], Results] | None,
    paths: Mapping[str, str],
    hashes: dict[str, str],
    user_action: Action | None,
) -> Decision:
    """Decide on the candidate by the rules. Rolling back promotes the best checkpoint if it passes, else the parent.

    candidate, parent: results by suite. evaluate_best: returns those of the best checkpoint that the candidate's stage
    kept; None where it kept none. paths: of `candidate`, `parent` and `best`. hashes: of checkpoints and suites, kept
    with the decision. user_action: overrules the rules.
    """
    apply = partial(apply_rule, confidence=config.confidence, seed=config.seed)
    rulings = [apply(rule, candidate, parent) for rule in config.rules]
    action = user_action or action_for(rulings, config)
    promoted, best_rulings = None, []
    if action == "promote":
        promoted = "candidate"
    elif action == "roll_back":
        promoted = "parent"
        if evaluate_best is not None:
            best = evaluate_best()
            best_rulings = [apply(rule, best, parent) for rule in config.rules]
            promoted = "best" if overall_outcome(best_rulings) == "holds" else "parent"
    return Decision(
        action,
        rulings,
        hashes,
        decided_by="user" if user_action else "rules",
        promoted=paths[promoted] if promoted else None,
        best=best_rulings,
    )


def launch(config: GateConfig, folder: Path, context: Context) -> dict[str, float]:
    """Evaluate both checkpoints, decide in `folder`, and link the promoted one as `hf`. Returns the figures, named
    `candidate/SUITE/FIGURE` and `parent/SUITE/FIGURE`.

    An evaluation of the same weights on the same suites is reused. Raises RunStopped where the action is to stop,
    DecisionNeeded where it is to ask.
    """
    console = Console()
    checkpoints = checkpoint_folders(config, folder)
    models = {"candidate": config.candidate, "parent": config.parent, "best": config.candidate}
    hashes = {name: model_hash(checkpoint, models[name]) for name, checkpoint in checkpoints.items()}
    if hashes.get("best") == hashes["candidate"]:  # the last step is the best one
        del checkpoints["best"], hashes["best"]
    hashes["suites"] = suites_hash(folder)
    figures: dict[str, float] = {}
    baselines = evaluate.baseline_answers(config, folder / evaluate.BASELINES)

    def results_of(name: str) -> Results:
        cache = context.evaluations / f"{hashes[name][:HASH_LENGTH]}-{hashes['suites'][:HASH_LENGTH]}"
        if not cache.is_dir():
            console.print(f"[dim]evaluating the {name}: {os.path.relpath(checkpoints[name], folder)}")
        run_suites = partial(evaluate.run, config, models[name], checkpoints[name], baselines=baselines)
        results = cached_evaluation(cache, run_suites)
        link(folder / name, cache)
        for suite, result in results.items():
            figures.update({f"{name}/{suite}/{figure}": value for figure, value in result.figures.items()})
        return results

    paths = {name: os.path.relpath(checkpoint, folder) for name, checkpoint in checkpoints.items()}
    evaluate_best = partial(results_of, "best") if "best" in checkpoints else None
    candidate, parent = results_of("candidate"), results_of("parent")
    user = _user_decision(folder, hashes)
    decision = run(config, candidate, parent, evaluate_best, paths, hashes, user.action if user else None)
    decision = replace(decision, note=user.note if user else "")
    write_decision(folder, decision)
    _print(decision, console)
    _apply(decision, folder)
    return figures


def check(config: GateConfig) -> None:
    """Raise ValueError for a chat template, source, text or reward that does not exist."""
    for model in (config.candidate, config.parent, *evaluate.baseline_models(config)):
        check_template(model)
    check_suites(config.suites, config.reward_pool)


def checkpoint_folders(config: GateConfig, folder: Path) -> dict[str, Path]:
    """Return the folders of `candidate`, `parent`, and `best` if the candidate's stage kept one."""
    models: dict[str, ModelConfig] = {"candidate": config.candidate, "parent": config.parent}
    folders = {name: resolve_model(model, workdir=folder) for name, model in models.items()}
    best = folders["candidate"].parent / "best" / "hf"
    return folders | ({"best": best.resolve()} if best.is_dir() else {})


def _user_decision(folder: Path, hashes: Mapping[str, str]) -> Decision | None:
    """The decision of `alignyard gate decide`, if it was about these checkpoints and suites."""
    decision = read_decision(folder)
    if decision is None or decision.decided_by != "user" or decision.hashes != hashes:
        return None
    return decision


def _print(decision: Decision, console: Console) -> None:
    console.print(rules_table(decision.rulings))
    if decision.best:
        console.print("the best checkpoint that the stage kept:")
        console.print(rules_table(decision.best))
    promoted = f"; the next stage starts from {decision.promoted}" if decision.promoted else ""
    by = " (the user's decision)" if decision.decided_by == "user" else ""
    console.print(f"[bold]{decision.action.replace('_', ' ')}[/]{by}{promoted}")


def _apply(decision: Decision, folder: Path) -> None:
    """Link the promoted checkpoint as `hf`, or raise the reason to promote none."""
    if decision.promoted is not None:
        link(folder / "hf", folder / decision.promoted)
        return
    command = f"`alignyard gate decide {folder.parent} {folder.name} promote|stop|roll_back`"
    rules = {
        outcome: [describe_rule(ruling.rule) for ruling in decision.rulings if ruling.outcome == outcome]
        for outcome in ("fails", "undecided")
    }
    reason = "; ".join(f"{outcome}: {', '.join(texts)}" for outcome, texts in rules.items() if texts)
    if decision.action == "ask":
        raise DecisionNeeded(
            f"gate '{folder.name}' can't decide ({reason}). Decide by {command}, then run the recipe again"
        )
    if decision.decided_by == "user":
        raise RunStopped(f"gate '{folder.name}' stops the run, as was decided")
    raise RunStopped(f"gate '{folder.name}' stops the run ({reason}). To overrule it: {command}")
