"""`alignyard rollouts RUN`: the kept samples of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from typer import Option

from configs.visible import visible
from jobs.command import OUT, PageFile, RunName, RunsDir, StageOption, verb_app
from jobs.runs import find_run, stage_folders

if TYPE_CHECKING:
    from pipeline.reports.samples import Card

app = verb_app()


@app.command("rollouts")
def show_rollouts(
    run: RunName,
    stage: StageOption = None,
    reward: Annotated[str | None, Option(metavar="RANGE", help="Total reward; 'none': left out, not judged.")] = None,
    verdict: Annotated[
        str | None, Option(metavar="WORD", help="An outcome or status, such as right or timeout; also REWARD:WORD.")
    ] = None,
    length: Annotated[str | None, Option(metavar="RANGE", help="Characters of the completion.")] = None,
    step: Annotated[str | None, Option(metavar="RANGE", help="Steps.")] = None,
    number: Annotated[int, Option("-n", metavar="N", min=1, help="Most samples to show.")] = 10,
    page: PageFile = None,
    runs_dir: RunsDir = Path("runs"),
) -> int:
    """Show the samples that a run has kept, newest step first: prompt, completion, reward and verdicts.

    A RANGE is A..B, A.., ..B or a single number, ends included.

    \b
    Examples:
      alignyard rollouts demo/reason --verdict wrong
      alignyard rollouts demo --reward ..0 --length 200.. --step 50.. -n 30 --page long_and_bad.html
    """
    from pipeline.reports.rollouts import UNJUDGED, Filter, Range, select_rollouts, write_rollouts_html

    record = find_run(run, runs_dir)
    accepting = Filter(
        reward=None if reward in (None, UNJUDGED) else Range.parse(reward, "--reward"),
        judged=reward != UNJUDGED,
        verdict=verdict,
        length=None if length is None else Range.parse(length, "--length"),
        steps=None if step is None else Range.parse(step, "--step"),
    )
    rollouts = select_rollouts(stage_folders(record, stage), accepting, number)
    for card in rollouts.cards:
        print_card(card)
    OUT.print(Text(rollouts.summary, style="bold"))
    for label, words in rollouts.words.items():
        counts = ", ".join(f"{word} {count}" for word, count in words.most_common())
        OUT.print(Text(f"  {label}: {counts}"), soft_wrap=True)
    if verdict is not None and not rollouts.accepted:
        OUT.print(f"no sample has the verdict '{visible(verdict)}'; without --verdict the words there are are counted")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts_html(rollouts, record.name, page)
        OUT.print(f"wrote {page}", soft_wrap=True)
    return 0


def print_card(card: "Card") -> None:
    """Prints a prompt and its answers, each with its reward and the words of its verdicts."""
    from pipeline.reports.page import elide

    OUT.print(Text(visible(elide(card.prompt)), style="dim"), soft_wrap=True)
    for answer in card.answers:
        score = "not judged" if answer.score is None else f"reward {answer.score:.4g}"
        facts = (answer.heading, score, answer.verdict)
        OUT.print(Text(visible(" · ".join(fact for fact in facts if fact)), style="bold"), soft_wrap=True)
        OUT.print(Text(visible(elide(answer.text)) or "(nothing)"), soft_wrap=True)
    OUT.print()
