"""A gate: candidate and parent on the same suites, and rules that say whether the candidate may go on."""

from collections.abc import Callable, Mapping

from configs.gate import GateConfig
from pipeline.evaluation.suites import SuiteResult
from pipeline.gates.decision import Decision, Verdict, outcome_of, verdict_of
from pipeline.gates.rules import judge


def run(
    config: GateConfig,
    evaluate: Callable[[str], Mapping[str, SuiteResult] | None],
    place: Mapping[str, str],
    hashes: dict[str, str],
    decided: Verdict | None,
) -> Decision:
    """Judge the candidate against the parent; to roll back is to promote the best kept checkpoint that passes, or the
    parent.

    evaluate: of `candidate`, `parent` or `best` the results by suite, None where there is no such checkpoint. place:
    where each lies. hashes: what the decision is about. decided: what the user said, which goes before the rules.
    """
    candidate, parent = evaluate("candidate"), evaluate("parent")
    assert candidate is not None and parent is not None, "a gate has both"
    seed, confidence = config.seed, config.confidence
    rulings = [judge(rule, candidate, parent, confidence=confidence, seed=seed) for rule in config.rules]
    verdict = decided or verdict_of(rulings, config)
    promoted, of_best = "candidate" if verdict == "promote" else None, []
    if verdict == "roll_back":
        best = evaluate("best")
        if best is not None:
            of_best = [judge(rule, best, parent, confidence=confidence, seed=seed) for rule in config.rules]
        promoted = "best" if best is not None and outcome_of(of_best) == "holds" else "parent"
    return Decision(
        verdict,
        rulings,
        hashes,
        decided_by="user" if decided else "rules",
        promoted=place[promoted] if promoted else None,
        best=of_best,
    )
