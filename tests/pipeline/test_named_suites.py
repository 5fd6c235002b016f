"""DeepSeek-V2's table of chat models as a list of suites: every suite read and answered with rows that are made up."""

import base64
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.evaluation import (
    AnySuite,
    ConversationSuite,
    EvalConfig,
    IFEvalSuite,
    LMEvalSuite,
    MultipleChoiceSuite,
    QuestionSuite,
)
from configs.load import load_config
from configs.named_suites import expand_suites
from configs.pairwise import PairwiseSuite
from configs.program_suites import CruxEvalSuite, HumanEvalSuite, LiveCodeBenchSuite, MBPPSuite
from pipeline.data.prompts import Prompts
from pipeline.evaluation.choices import load_choices, run_choices
from pipeline.evaluation.conversations import conversation_task, run_conversations
from pipeline.evaluation.generation import load_prompts
from pipeline.evaluation.ifeval import instruction_task, run_ifeval
from pipeline.evaluation.pairwise import load_contest, run_pairwise
from pipeline.evaluation.programs import program_task
from pipeline.evaluation.questions import question_task
from pipeline.evaluation.suites import SuiteResult
from pipeline.evaluation.tasks import run_tasks
from rewards.plugins.build import build_reward
from rewards.types import Task, Verdict
from tests.pipeline.test_evaluation_suites import TOKENIZER, Actor, Bench, session
from tests.pipeline.test_pairwise import NoProblems

SETTINGS: dict[str, Any] = {
    "type": "eval",
    "model": {"path": "m"},
    "sampling": {"max_tokens": 1024},
    "rollout": {"max_model_len": 8192},
}
JUDGE = {"url": "http://judge:1/v1", "model": "grader", "api_key_env": "KEY"}


def config(suites: Any) -> EvalConfig:
    return EvalConfig.model_validate(SETTINGS | {"suites": suites})


PRINTED = {
    "triviaqa": 5, "natural_questions": 5, "mmlu": 5, "arc_easy": 25, "arc_challenge": 25, "bbh": 3, "agieval": 0,
    "ifeval": 0, "humaneval": 0, "mbpp": 3, "cruxeval_input": 2, "cruxeval_output": 2, "livecodebench": 0, "gsm8k": 8,
    "math": 4, "cmath": 0, "cluewsc": 5, "ceval": 5, "cmmlu": 5,
}  # fmt: skip
"""Table 3 of arXiv:2405.04434: worked examples of each benchmark."""


def test_the_list_has_every_benchmark_with_the_printed_examples() -> None:
    suites = config("deepseek_v2_chat").suites
    open_ended = ["mt_bench", "alpaca_eval", "alignbench"]  # tables 4 and 5
    assert list(suites) == [*PRINTED, *open_ended]
    shots = {n: s.num_fewshot if isinstance(s, LMEvalSuite) else getattr(s, "shots", 0) for n, s in suites.items()}
    assert {name: shots[name] for name in PRINTED} == PRINTED
    window = suites["livecodebench"]
    assert isinstance(window, LiveCodeBenchSuite) and (window.since, window.until) == ("2023-09-01", "2024-04-01")
    judges = [spec for suite in suites.values() for spec in suite.rewards() if spec.name == "judge"]
    assert len(judges) == 5
    rubrics: Any = [build_reward(spec) for spec in judges]
    pair = next(rubric for rubric in rubrics if rubric.rubric_file.endswith("alpaca_eval.txt"))
    [asked] = pair.question(Task("Which?", "the baseline's"), "the checkpoint's")
    assert 0 < asked["content"].index("the baseline's") < asked["content"].index("the checkpoint's")
    assert pair.read("Close. [[4]]") == 4.0  # the second is slightly better: three quarters of a win on the scale


def test_the_tasks_of_the_harness_exist() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    names = {s.task for s in config("deepseek_v2_chat").suites.values() if isinstance(s, LMEvalSuite)}
    parts = ("triviaqa", "nq_open", "arc", "bbh/cot_fewshot", "agieval")
    texts = [file.read_text() for part in parts for file in (folder / part).glob("*.yaml")]
    assert len(names) == 6
    assert all(any(f"task: {name}\n" in text or f"group: {name}\n" in text for text in texts) for name in names)


def test_a_list_takes_another_judge_other_files_and_a_part(tmp_path: Path) -> None:
    named = {"list": "deepseek_v2_chat", "only": ["mt_bench", "alpaca_eval"], "data": "elsewhere", "judge": JUDGE}
    (tmp_path / "eval.yaml").write_text(json.dumps(SETTINGS | {"suites": named}))
    suites = load_config(str(tmp_path / "eval.yaml"), [], EvalConfig).config.suites
    assert list(suites) == ["mt_bench", "alpaca_eval"]
    arguments = suites["alpaca_eval"].rewards()[0].args
    assert JUDGE.items() <= arguments.items() and arguments["highest"] == 5.0
    assert getattr(suites["mt_bench"], "source").paths == ["elsewhere/mt_bench.jsonl"]  # noqa: B009
    assert config(config(named).model_dump()["suites"]).suites == suites  # a recorded configuration is read again
    assert expand_suites({"list": {"type": "text", "path": "a.txt"}}) == {"list": {"type": "text", "path": "a.txt"}}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("deepseek_v2", "no list of suites 'deepseek_v2'; did you mean 'deepseek_v2_chat'"),
        ({"list": "deepseek_v2_chat", "onyl": []}, "unknown key 'onyl'"),
        ({"list": "deepseek_v2_chat", "only": ["mnlu"]}, "no suite 'mnlu'; did you mean 'mmlu'"),
    ],
)
def test_a_misspelt_list_names_its_neighbour(named: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(named)


EXAM = {"id": 0, "question": "\u4e00\u52a0\u4e8c\uff1f", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "A"}
HUB: dict[str, dict[str, Any]] = {
    "cais/mmlu": {"question": "1 + 2?", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 0},
    "google/IFEval": {"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "openai/openai_humaneval": {
        "task_id": "t/0", "prompt": "def three():\n    '''3'''\n", "entry_point": "three", "canonical_solution": "",
        "test": "def check(candidate):\n    assert candidate() == 3\n",
    },
    "google-research-datasets/mbpp": {
        "task_id": 2, "text": "Return 3.", "code": "def three():\r\n  return 3", "test_list": ["assert three() == 3"],
        "test_setup_code": "", "challenge_test_list": [],
    },
    "cruxeval-org/cruxeval": {"code": "def f(a, b):\n    return a + b", "input": "1, 2", "output": "3", "id": "s0"},
    "openai/gsm8k": {"question": "What is 1 + 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
    "EleutherAI/hendrycks_math": {"problem": "$1 + 2$?", "level": "1", "type": "A", "solution": "It is $\\boxed{3}$."},
    "weitianwen/cmath": {"grade": 1, "reasoning_step": 1, "num_digits": 1, "question": "1+2=?", "golden": "3"},
    "clue/clue": {
        "idx": 0, "text": "\u5c0f\u660e\u8bf4\u4ed6\u7d2f\u4e86", "label": 0,
        "target": {"span1_text": "\u5c0f\u660e", "span2_text": "\u4ed6", "span1_index": 0, "span2_index": 3},
    },
    "ceval/ceval-exam": EXAM,
    "haonan-li/cmmlu": {"Question": "1 + 2?", "A": "3", "B": "4", "C": "5", "D": "6", "Answer": "A"},
}  # fmt: skip
"""Rows with the columns of public data sets; each is answered by 3, A or yes."""


PRINTED_SCORES = [
    ("\u6570\u5b66\u8ba1\u7b97", 7.77), ("\u903b\u8f91\u63a8\u7406", 7.14), ("\u57fa\u672c\u4efb\u52a1", 8.10),
    ("\u4e2d\u6587\u7406\u89e3", 8.28), ("\u7efc\u5408\u95ee\u7b54", 8.37), ("\u6587\u672c\u5199\u4f5c", 8.53),
    ("\u89d2\u8272\u626e\u6f14", 8.33), ("\u4e13\u4e1a\u80fd\u529b", 8.53),
]  # fmt: skip
"""Table 5 of arXiv:2405.04434: scores of DeepSeek-V2 Chat (RL) by AlignBench's categories."""


def contest(day: str, **more: Any) -> dict[str, Any]:
    private = json.dumps([{"input": "40 2\n", "output": "42\n", "testtype": "stdin"}])
    return {
        "question_title": "Sum", "question_content": "Print the sum.", "platform": "atcoder", "question_id": "abc_a",
        "contest_id": "abc", "contest_date": f"{day}T00:00:00", "starter_code": "", "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(private))).decode(), "metadata": "{}",
    } | more  # fmt: skip


METHOD = {
    "starter_code": "class Solution:\n    def pairs(self, a: List[int]) -> List[List[int]]:\n        ",
    "public_test_cases": json.dumps(
        [{"input": "[1, 2]\n", "output": "[[1, true], [2, false]]", "testtype": "functional"}]
    ),
    "private_test_cases": "[]",
    "metadata": json.dumps({"func_name": "pairs"}),
}
SOLUTIONS = {
    "reads standard input": "print(sum(map(int, input().split())))",
    "whole class": "class Solution:\n    def pairs(self, a: List[int]):\n        return [(x, x < 2) for x in a]",
}
FILES: dict[str, list[dict[str, Any]]] = {
    "livecodebench/test.jsonl": [contest("2023-08-31"), contest("2023-09-01"), contest("2024-04-01", **METHOD)],
    "mt_bench.jsonl": [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
        {"question_id": 111, "category": "math", "turns": ["1 + 2?", "Twice?"], "reference": ["3", "6"]},
    ],
    "alpaca_eval.jsonl": [{"instruction": "Hello?", "output": "go away", "generator": "gpt4_1106_preview"}],
    "alignbench.jsonl": [
        {"category": category, "question": f"Q{score}", "reference": f"{score}"} for category, score in PRINTED_SCORES
    ],
}  # fmt: skip


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, AnySuite]]:
    def load_dataset(path: str, name: str | None, **_: Any) -> list[dict[str, Any]]:
        return [HUB[path]] * (1 if path.startswith(("ceval", "haonan")) and name != "law" else 8)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name, rows in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield config({"list": "deepseek_v2_chat", "data": str(tmp_path)}).suites


def read(suite: Any, task_of: Any) -> Prompts:
    """The suite's prompts, which its own rewards accept."""
    prompts = load_prompts(suite, TOKENIZER, task_of, 0)
    rewards = {spec.label: build_reward(spec) for spec in suite.rewards()}
    for prompt in prompts:
        for label in prompt.task.kind.split() or [suite.reward.label]:
            getattr(rewards[label], "check", lambda _: None)(prompt.task)
    assert not prompts.bad_rows.counts
    return prompts


@pytest.mark.parametrize(
    ("name", "answer", "rows"),
    [
        ("humaneval", "```python\ndef three():\n    return 3\n```", 8),
        ("mbpp", "```python\ndef three():\n    return 3\n```", 8),
        ("cruxeval_input", "f adds. [ANSWER]f(0, 3) == 3[/ANSWER]", 8),  # another input with this output
        ("cruxeval_output", "f adds. [ANSWER]f(1, 2) == 3[/ANSWER]", 8),
        ("gsm8k", "The answer is 3.", 8),
        ("math", "$\\boxed{3}$", 56),
        ("cmath", "3", 8),
        ("cluewsc", "\u662f\u3002", 8),
    ],
)
def test_a_right_answer_passes_and_a_wrong_one_fails(
    suites: dict[str, AnySuite], name: str, answer: str, rows: int
) -> None:
    suite = suites[name]
    task_of: Any = question_task(suite) if isinstance(suite, QuestionSuite) else program_task(suite)  # type: ignore[arg-type]
    prompts = read(suite, task_of)
    assert len(prompts) == rows and isinstance(suite, QuestionSuite | HumanEvalSuite | MBPPSuite | CruxEvalSuite)
    turns = len(prompts[0].task.conversation)
    assert turns == 2 * PRINTED[name] + 1  # every example is a turn of the user and one of the assistant
    few = Prompts([prompts[0]], prompts.bad_rows, 0)
    for text, right in ((answer, 1.0), (answer.replace("3", "4").replace("\u662f", "\u5426"), 0.0)):
        result = run_tasks(suite, few, session(Actor(lambda _, text=text: text), Bench(suite)))
        assert result.figures["pass@1_greedy"] == right, (text, result.records[0])


def test_the_window_of_livecodebench_and_both_forms_of_its_tests(suites: dict[str, AnySuite]) -> None:
    suite = suites["livecodebench"]
    assert isinstance(suite, LiveCodeBenchSuite)
    prompts = read(suite, program_task(suite))
    assert [prompt.task.metadata["contest_date"] for prompt in prompts] == ["2023-09-01", "2024-04-01"]
    solve = Actor(lambda prompt: next(code for text, code in SOLUTIONS.items() if text in prompt))
    result = run_tasks(suite, prompts, session(solve, Bench(suite)))
    assert result.figures["pass@1_greedy"] == 1.0, result.records
    # Passes the public test of the first problem, but not the private one; and returns numbers for booleans' names.
    wrong = {"reads standard input": "print(3)", "whole class": SOLUTIONS["whole class"].replace("x < 2", "str(x < 2)")}
    guess = Actor(lambda prompt: next(code for text, code in wrong.items() if text in prompt))
    assert run_tasks(suite, prompts, session(guess, Bench(suite))).figures["pass@1_greedy"] == 0.0
    later = suite.model_copy(update={"since": "2025-01-01", "until": None})
    with pytest.raises(ValueError, match="leaves out every row"):
        load_prompts(later, TOKENIZER, program_task(later), 0)


def test_tests_that_would_run_code_when_they_are_read_are_bad_rows(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
            return (Path, (str(tmp_path),))

    evil = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    rows = [contest("2024-01-01"), contest("2024-01-01", private_test_cases=evil), contest("then")]
    rows += [contest("2024-01-01", **(METHOD | {"metadata": "{}"})), contest("2024-01-01", public_test_cases="[1]")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "file", "paths": [str(tmp_path / "rows.jsonl")]}
    suite = LiveCodeBenchSuite.model_validate({"type": "livecodebench", "source": source, "max_bad_share": 1.0})
    prompts = load_prompts(suite, TOKENIZER, program_task(suite), 0)
    assert len(prompts) == 1
    assert prompts.bad_rows.counts == {"unreadable tests": 2, "no date": 1, "no tests of a function": 1}


@pytest.mark.parametrize("since", ["September", "2023-13-01", "2024-05-01"])
def test_a_window_is_two_days_in_order(since: str) -> None:
    source = {"type": "file", "paths": ["x.jsonl"]}
    with pytest.raises(ValueError, match=r"is no day|is after until"):
        LiveCodeBenchSuite.model_validate(
            {"type": "livecodebench", "source": source, "since": since, "until": "2024-04-01"}
        )


def test_exams_and_instructions(suites: dict[str, AnySuite]) -> None:
    results: dict[str, SuiteResult] = {}
    for name in ("mmlu", "ceval", "cmmlu"):
        suite = suites[name]
        assert isinstance(suite, MultipleChoiceSuite)
        if name != "mmlu":  # one subject of many, with its own examples
            only = {key: getattr(suite, key).model_copy(update={"name": ["law"]}) for key in ("source", "shots_source")}
            suite = suite.model_copy(update=only)
        questions, bad_rows = load_choices(suite, TOKENIZER)
        assert len(questions) == 8 and not bad_rows.counts
        results[name] = run_choices(questions, session(Actor(str, lambda _, choice: -ord(choice.strip()))))
        assert results[name].figures["accuracy"] == 1.0
        if name == "ceval":
            text = str(TOKENIZER.decode(questions[0].context_ids[1:]))
            assert text.startswith("\u4ee5\u4e0b\u662f\u4e2d\u56fd\u5173\u4e8elaw\u8003\u8bd5")
            assert text.count("\u7b54\u6848\uff1aA\n\n") == 5 and text.endswith("D. 6\n\u7b54\u6848\uff1a")
    suite = suites["ifeval"]
    assert isinstance(suite, IFEvalSuite)
    prompts = read(suite, instruction_task)
    assert run_ifeval(prompts, session(Actor(lambda _: "none"), Bench(suite))).figures["prompt_loose"] == 1.0


class Scores(Bench):
    """Grades as the truth says, or the number of the conversation's messages; the label says who was asked."""

    def __init__(self, suite: AnySuite) -> None:
        super().__init__(suite)
        self.asked: list[str] = []
        for label in self._rewards:
            self._rewards[label] = type("Grader", (), {"score": staticmethod(self._grade)})

    def _grade(self, task: Any, _: str) -> Any:
        self.asked.append(task.kind)
        return Verdict(float(task.truth) if task.truth else float(len(task.messages)))


def test_mt_bench_by_turn_category_and_temperature(suites: dict[str, AnySuite]) -> None:
    suite = suites["mt_bench"]
    assert isinstance(suite, ConversationSuite)
    prompts = read(suite, conversation_task(suite))
    result = run_conversations(suite, prompts, TOKENIZER, session(Actor(lambda _: "Words."), judge := Scores(suite)))
    # Without references: 1 message before the first answer, 3 before the second. With them: 3 and 6, as they say.
    assert result.items["score_mean"].values().__len__() == 4
    figures = result.figures
    assert (figures["score_mean_writing"], figures["score_mean_math"], figures["score_mean"]) == (2.0, 4.5, 3.25)
    assert (figures["score_mean_turn_1"], figures["score_mean_turn_2"]) == (2.0, 4.5)
    assert sorted(judge.asked) == ["answer", "answer", "referenced", "referenced"]
    assert [record.mode for record in result.records] == ["sampled", "sampled", "greedy", "greedy"]


def test_alignbench_adds_up_as_in_the_printed_table(suites: dict[str, AnySuite]) -> None:
    # Table 5, DeepSeek-V2 Chat (RL): reasoning 7.45 of 7.77 and 7.14, language 8.36 of six, overall 7.91.
    suite = suites["alignbench"]
    assert isinstance(suite, ConversationSuite)
    prompts = read(suite, conversation_task(suite))
    result = run_conversations(suite, prompts, TOKENIZER, session(Actor(lambda _: "Words."), Scores(suite)))
    assert result.figures["group_mean_reasoning"] == pytest.approx(7.45, abs=0.006)
    assert result.figures["group_mean_language"] == pytest.approx(8.36, abs=0.006)
    assert result.figures["group_mean"] == pytest.approx(7.91, abs=0.006)


def test_alpaca_eval_reads_its_baseline_from_the_same_rows(suites: dict[str, AnySuite]) -> None:
    suite = suites["alpaca_eval"]
    assert isinstance(suite, PairwiseSuite)
    contest_of = load_contest(suite, NoProblems(), TOKENIZER, 0, {})  # type: ignore[arg-type]
    assert contest_of.answers == {"gpt4_turbo": ["go away"]}

    class Kind(Bench):
        def submit(self, index: int, task: Any, completions: list[str]) -> None:
            mark = 5.0 if completions[0] == "Hello!" else 1.0
            self._judged[index] = [{"judge": Verdict(mark)}]

    result = run_pairwise(suite, contest_of, session(Actor(lambda _: "Hello!"), Kind(suite)))
    assert result.figures["win_rate"] == 1.0 and result.figures["length_controlled_win_rate"] > 0.9
