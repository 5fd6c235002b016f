"""`alignyard data show FILE`: rows as a model will see them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.text import Text
from typer import Argument, Option

from configs.visible import visible
from jobs.command import OUT, PageFile, one_line, verb_app

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.rows import BadRows

app = verb_app()
_CHARACTERS = 4000
"""Longest text of a row that is shown."""


@app.callback()
def _data() -> None:
    """Show data as a model will see it.

    \b
    Example:
      alignyard data show chat.jsonl --config my_sft.yaml
    """


@app.command("show")
def show_data(
    file: Annotated[str, Argument(metavar="FILE", help="JSON lines or Parquet; a pattern takes several.")],
    config: Annotated[
        str | None, Option(metavar="CONFIG", help="A stage's YAML file, whose model and settings read the rows.")
    ] = None,
    rows: Annotated[int, Option(metavar="N", help="Number of rows to show.")] = 3,
    page: PageFile = None,
) -> int:
    """Show the first rows of a file, the form that was recognised, and what is bad and why.

    With the configuration of a stage of type sft, rows are rendered by the chat template: what is trained on stands in
    green between double brackets, everything else is context. With one of type grpo, rm or dpo, prompts and answers are
    shown. Without a configuration, the messages are shown as they are read for sft.

    \b
    Examples:
      alignyard data show chat.jsonl
      alignyard data show chat.jsonl --config my_sft.yaml --rows 10 --page rows.html
    """
    from configs.data import FileSource
    from pipeline.data.rows import BadRows

    out = Console(record=True, width=OUT.width) if page is not None else OUT
    bad_rows, source = BadRows(), FileSource(type="file", paths=[file])
    shown, good = 0, 0
    for where, text, size in _rendered(source, config, bad_rows):
        good += 1
        if shown < rows:
            shown += 1
            out.print(Text(f"--- {one_line(where, 90, tail=60)}: {size}", style="bold"), soft_wrap=True)
            out.print(text[:_CHARACTERS], soft_wrap=True)
    out.print(Text(f"--- {good} good rows", style="bold"))
    if bad_rows.counts or bad_rows.doubts or bad_rows.forms:
        out.print(Text(bad_rows.summary(), style="yellow"), soft_wrap=True)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        out.save_html(str(page))
        OUT.print(f"wrote {page}", soft_wrap=True)
    return 0 if good else 2


def _rendered(source: Any, config: str | None, bad_rows: "BadRows") -> Iterator[tuple[str, Text, str]]:
    """Yields the place, the text and the size of each good row."""
    if config is None:
        yield from _messages(source, bad_rows)
        return
    from configs.load import find_config, load_config, read_yaml
    from configs.stages import STAGES
    from pipeline.models.tokenizer import load_tokenizer
    from pipeline.weights.resolve import resolve_model

    kind = str(read_yaml(find_config(config)).get("type"))
    if kind not in ("sft", "grpo", "rm", "dpo"):
        raise ValueError(f"--config {config}: type '{kind}' reads no rows of its own; give one of sft, grpo, rm or dpo")
    stage: Any = load_config(config, [], STAGES[kind]).config
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(resolve_model(stage.model, workdir=Path(folder)), stage.model.chat_template)
        data = (stage.prompts if kind == "grpo" else stage.data).model_copy(update={"source": source})
        reader = {"sft": _conversations, "grpo": _prompts}.get(kind, _comparisons)
        yield from reader(data, tokenizer, bad_rows)


def _messages(source: Any, bad_rows: "BadRows") -> Iterator[tuple[str, Text, str]]:
    from configs.data import ConversationData
    from pipeline.data.conversations import messages_of
    from pipeline.data.messages import parse_messages
    from pipeline.data.rows import BadRowError, read_rows

    config = ConversationData(source=source)
    for row in read_rows(source, bad_rows):
        try:
            messages = parse_messages(messages_of(config, row, bad_rows), last_role="assistant")
        except BadRowError as error:
            bad_rows.add(row.where, error)
            continue
        text = Text()
        for message in messages:
            text.append(f"{message['role']}: ", style="bold")
            text.append(f"{visible(message['content'])}\n")
        yield row.where, text, f"{len(messages)} messages"


def _conversations(
    data: Any, tokenizer: "PreTrainedTokenizerFast", bad_rows: "BadRows"
) -> Iterator[tuple[str, Text, str]]:
    from itertools import groupby

    from pipeline.data.conversations import tokenised

    for example in tokenised(data, tokenizer, bad_rows):
        text = Text()
        pairs = zip(example.token_ids, example.loss_mask, strict=True)
        for is_trained, group in groupby(pairs, key=lambda pair: bool(pair[1])):
            piece = visible(str(tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)))
            text.append(f"[[{piece}]]" if is_trained else piece, style="green" if is_trained else "dim")
        yield example.where, text, f"{len(example.token_ids)} tokens, {sum(example.loss_mask)} of them trained on"


def _prompts(data: Any, tokenizer: "PreTrainedTokenizerFast", bad_rows: "BadRows") -> Iterator[tuple[str, Text, str]]:
    from pipeline.data.prompts import Prompts

    prompts = Prompts.load(data.model_copy(update={"max_bad_share": 1.0}), tokenizer)
    found = prompts.bad_rows
    bad_rows.seen, bad_rows.counts, bad_rows.examples = found.seen, found.counts, found.examples
    for prompt in prompts:
        text = Text(visible(str(tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False))), style="dim")
        text.append(f"\ntruth: {visible(str(prompt.task.truth))}", style="bold not dim")
        yield prompt.task.row, text, f"{len(prompt.token_ids)} tokens"


def _comparisons(data: Any, _: object, bad_rows: "BadRows") -> Iterator[tuple[str, Text, str]]:
    from pipeline.data.comparisons import read_comparisons

    for comparison in read_comparisons(data, bad_rows):
        text = Text()
        for message in comparison.messages:
            text.append(f"{message['role']}: {visible(message['content'])}\n", style="dim")
        for place, answer in enumerate(comparison.answers, start=1):
            text.append(f"{place}. {visible(answer)}\n", style="green" if place == 1 else "")
        yield comparison.row, text, f"{len(comparison.answers)} answers, best first"
