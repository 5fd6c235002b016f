"""Alignyard from Python: the verbs of the command as functions, and a run's files as data frames.

Each function calls what the verb of its name calls. Nothing here asks questions or ends the process: wrong input raises
ValueError, a run that stopped itself `RunStopped`, a gate that waits for a person `DecisionNeeded`.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from jobs.import_guard import check_imports

    check_imports()
    from jobs.runs import Run, all_records, ended_well, find_run
    from pipeline.errors import DecisionNeeded, RunStopped
except (ImportError, ValueError) as error:
    raise ImportError(
        f"alignyard's own packages can't be imported ({error}); rename folders and files called jobs, configs, "
        "rewards, rollout or pipeline beside your notebook or script, and start Python again"
    ) from error

if TYPE_CHECKING:
    from pandas import DataFrame

    from configs.rewards import RewardSpec
    from configs.stages import AnyStage, Recipe
    from rewards.offline import CompletionRow

__all__ = [
    "DecisionNeeded",
    "Run",
    "RunStopped",
    "check",
    "evaluate",
    "generate",
    "list_runs",
    "load",
    "open_run",
    "run",
    "score",
    "serve",
    "submit",
]

_REQUESTS_AT_A_TIME = 64


def load(file: str | Path, *overrides: str) -> "Recipe | AnyStage":
    """Load a recipe by its file or its shipped name, or the configuration of one stage.

    overrides: `key=value` with a dotted key and a YAML value, as on the command line. Raises ValueError naming each
    wrong key.

    >>> recipe = load("demo", "seed=3", "stages.sft.steps=60")
    >>> recipe.stages["sft"].steps
    60
    """
    from jobs.start import load_any

    return load_any(str(file), overrides).config


def run(
    target: "str | Path | Recipe | AnyStage",
    *overrides: str,
    output: str | Path | None = None,
    start: str | None = None,
    until: str | None = None,
    only: str | None = None,
    address: str = "",
) -> "Run":
    """Run a recipe, or one stage in this process, to its end, and print its output. What is done is reused, an
    interrupted run goes on.

    output: folder of a stage, by default runs/NAME for NAME.yaml. start, until, only, address: for a recipe, as the
    options of `alignyard run` (start is --from). Raises ValueError, RunStopped and DecisionNeeded with the reason why
    it did not end well, RuntimeError for a fault.

    >>> done = run("tiny_sft.yaml", "steps=2")  # doctest: +ELLIPSIS
    ─... tiny_sft (sft) ─...
    >>> len(done.metrics())
    2
    """
    from configs.stages import Recipe
    from jobs.start import new_order, start_order

    _prepare()
    config, folder = _configured(target, overrides, output)
    if isinstance(config, Recipe):
        order = new_order(config, address, start=start, until=until, only=only)
        code = start_order(order, detach=False)
        return ended_well(order.folder, code)
    if start or until or only or address:
        raise ValueError("start, until, only and address go with a recipe; `submit` takes a stage to a cluster")
    from pipeline.run.stage import run_stage

    run_stage(config, folder)
    return Run(folder)


def submit(
    target: "str | Path | Recipe | AnyStage", *overrides: str, output: str | Path | None = None, address: str = ""
) -> "Run":
    """Start a recipe, or one stage as a run of its own, in the background, and return as soon as its stages start.

    It goes on when this process ends. output: as with `run`. address: job server of a Ray cluster. Raises ValueError
    and RunStopped where it did not start.

    >>> started = submit("tiny_sft.yaml", "steps=2", output="runs/background")  # doctest: +ELLIPSIS
    started background ...
    >>> started.wait().state
    'done'
    """
    from configs.stages import Recipe
    from jobs.start import new_order, recipe_of, start_order

    _prepare()
    config, folder = _configured(target, overrides, output)
    recipe = config if isinstance(config, Recipe) else recipe_of(config, folder)
    order = new_order(recipe, address)
    return ended_well(order.folder, start_order(order, detach=True))


def open_run(run: str | Path | None = None, runs_dir: str | Path = "runs") -> "Run":
    """Open a run, or a stage that was run alone, by its name below `runs_dir` or by its folder; the newest without one.

    Raises ValueError where there is none.

    >>> open_run("demo").state
    'done'
    """
    return Run(Path(find_run(None if run is None else str(run), Path(runs_dir)).folder))


def list_runs(runs_dir: str | Path = "runs") -> "DataFrame":
    """The runs and single stages below a folder, oldest first: name, state, reason, stages_done, stages, started,
    folder. A damaged one is listed with its problem as reason.

    >>> list_runs()[["name", "state", "stages_done"]].to_dict("records")
    [{'name': 'demo', 'state': 'done', 'stages_done': 1}]
    """
    import pandas as pd

    records, damaged = all_records(Path(runs_dir))
    rows: list[dict[str, Any]] = [
        {
            "name": record.name,
            "state": record.state,
            "reason": record.reason,
            "stages_done": sum(stage.state == "done" for stage in record.stages.values()),
            "stages": len(record.stages),
            "started": pd.Timestamp(record.started, unit="s"),
            "folder": record.folder,
        }
        for record in records
    ]
    rows += [
        {"name": folder.name, "state": "damaged", "reason": reason, "folder": str(folder)}
        for folder, reason in damaged.items()
    ]
    return pd.DataFrame(rows, columns=["name", "state", "reason", "stages_done", "stages", "started", "folder"])


def serve(checkpoint: str | Path) -> AbstractContextManager[str]:
    """Serve a checkpoint by vLLM on a free port while a `with` block runs, and give the server's address, which speaks
    OpenAI's protocol.

    checkpoint: a checkpoint's folder, a stage's folder, or a model of the hub.

    >>> with serve("runs/tiny_sft") as url:
    ...     answers = generate(url, ["1+1=", "2+2="], max_tokens=4)
    >>> len(answers)
    2
    """
    from jobs.serving import checkpoint_folder, served

    _prepare()
    return served(checkpoint_folder(str(checkpoint)), str(checkpoint))


def generate(
    model: str | Path,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    system: str = "",
    temperature: float = 0.0,
    max_tokens: int | None = None,
) -> list[str]:
    """Answer prompts, each a text or a list of messages, in their order.

    model: as with `serve`, which a call starts and ends, or the address of a server. temperature: 0 takes the likeliest
    token. max_tokens: None takes all that fit. Raises ValueError for a reward model and for a prompt that is too long.

    >>> len(generate("runs/tiny_sft", ["1+1="], max_tokens=4))
    1
    """
    from jobs.serving import answer_pieces, policy_folder, served, served_model

    if not str(model).startswith(("http://", "https://")):
        _prepare()
        with served(policy_folder(str(model)), str(model)) as url:
            return generate(url, prompts, system=system, temperature=temperature, max_tokens=max_tokens)
    url = str(model).rstrip("/").removesuffix("/v1")
    body: dict[str, Any] = {"model": served_model(url), "temperature": temperature}
    body |= {} if max_tokens is None else {"max_tokens": max_tokens}
    head = [{"role": "system", "content": system}] if system else []

    def answer(prompt: str | Sequence[Mapping[str, str]]) -> str:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(dict, prompt)]
        return "".join(piece for piece, _ in answer_pieces(url, body | {"messages": [*head, *messages]}))

    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as threads:
        return list(threads.map(answer, prompts))


def score(
    reward: str,
    rows: "str | Path | DataFrame | Iterable[Mapping[str, Any]]",
    *,
    truth: str | None = None,
    workers: int = 1,
    timeout: float = 5.0,
    **args: Any,
) -> "DataFrame":
    """Judge rows by a reward: the rows in their order, with the columns score, status, outcome, detail and seconds.

    reward: a listed name, or path/to/file.py:NAME, which is read anew at each call. rows: a JSONL file, a frame or
    mappings with `prompt` and `completion`. truth: column of the gold answers, `truth` by default. args: arguments of
    the reward. A row that can't be judged has the status bad_row. Raises ValueError for a wrong reward.

    >>> rows = [{"prompt": "6*7=", "completion": answer, "truth": "42"} for answer in ("42", "41")]
    >>> score("math", rows)["score"].tolist()
    [1.0, 0.0]
    """
    import pandas as pd

    from rewards.offline import judge_rows, verdict_columns

    _prepare()
    results = judge_rows(_rows(rows, truth), _spec(reward, args), workers=workers, timeout_seconds=timeout)
    return pd.DataFrame([row.values | verdict_columns(row, verdict) for row, verdict in results])


def check(
    reward: str,
    rows: "str | Path | DataFrame | Iterable[Mapping[str, Any]]",
    *,
    truth: str | None = None,
    timeout: float = 5.0,
    **args: Any,
) -> "DataFrame":
    """Try a reward's contract on rows and on hostile text: a row a clause, with `kept` and `evidence`.

    kept: None where these rows can't show it. reward, rows, truth, args: as with `score`; a row's `expected` is the
    score that it should get.

    >>> clauses = check("math", [{"prompt": "6*7=", "completion": "42", "truth": "42", "expected": 1.0}])
    >>> clauses[clauses["kept"] == False].empty
    True
    """
    import pandas as pd

    from rewards.contract import check_contract

    _prepare()
    clauses, _ = check_contract(_spec(reward, args), list(_rows(rows, truth)), timeout_seconds=timeout)
    return pd.DataFrame([{"clause": one.name, "kept": one.kept, "evidence": one.evidence} for one in clauses])


def evaluate(
    checkpoint: str | Path, suite: str | Path, *overrides: str, output: str | Path | None = None
) -> dict[str, float]:
    """Evaluate a checkpoint by the suites of a file of type `eval`, and return the figures. A finished one is reused.

    overrides: of the suite's file. output: folder of the results, by default named below runs/. Raises ValueError for
    wrong input, RunStopped where judging kept failing.

    >>> figures = evaluate("runs/tiny_sft", "tiny_eval.yaml")  # doctest: +ELLIPSIS
    ─... (eval) ─...
    >>> 0 <= figures["sums/pass@1_greedy"] <= 1
    True
    """
    from jobs.serving import checkpoint_folder
    from jobs.start import evaluation_of

    _prepare()
    config, folder = evaluation_of(str(checkpoint_folder(str(checkpoint))), str(suite), overrides)
    from pipeline.run.stage import run_stage

    return run_stage(config, Path(output) if output else folder)


def _prepare() -> None:
    """Silence libraries as the command does, before they are imported, and replace a home that is read-only."""
    from jobs.command import quieten
    from pipeline.disk.home import replace_read_only_home

    quieten()
    replace_read_only_home()


def _configured(
    target: "str | Path | Recipe | AnyStage", overrides: Sequence[str], output: str | Path | None
) -> "tuple[Recipe | AnyStage, Path]":
    """A configuration with the folder of its results, which a recipe names itself."""
    if isinstance(target, str | Path):
        return load(target, *overrides), Path(output or Path("runs") / Path(target).stem)
    if overrides:
        raise ValueError("overrides go with a file; give them to `load`, which made this configuration")
    if "stages" not in type(target).model_fields and output is None:
        raise ValueError("a stage that was loaded before needs output=FOLDER")
    return target, Path(output or "")


def _spec(reward: str, args: Mapping[str, Any]) -> "RewardSpec":
    from configs.rewards import RewardSpec
    from rewards.plugins.names import absolute

    return absolute(RewardSpec(name=reward, args=dict(args)))


def _rows(rows: "str | Path | DataFrame | Iterable[Mapping[str, Any]]", truth: str | None) -> "Iterable[CompletionRow]":
    import pandas as pd

    from rewards.offline import completion_rows, read_completions

    if isinstance(rows, str | Path):
        return read_completions(Path(rows), truth)
    if isinstance(rows, pd.DataFrame):
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")  # pyright: ignore
    return completion_rows(rows, truth)  # pyright: ignore[reportArgumentType]
