"""An evaluation on a real engine and a real judge: the figures are those that `transformers` gives for the weights."""

import ast
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerFast

from configs.data import Source
from configs.evaluation import EvalConfig, LMEvalSuite, TaskSuite, TextSuite
from configs.rewards import RewardPoolConfig
from configs.sampling import SamplingConfig
from pipeline.cluster.start import start_rewards
from pipeline.data.chat import ChatFormat
from pipeline.data.rows import BadRows, read_rows
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.evaluation.suites import Session, SuiteResult
from pipeline.evaluation.texts import load_text, run_text
from pipeline.models.tokenizer import load_tokenizer
from pipeline.stages import evaluate
from rollout.pool import RolloutPool
from tests.rollout import tiny
from tests.rollout.pools import engine_pool

pytestmark = pytest.mark.engine

MODEL = tiny.llama(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(MODEL, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def rollout(folder: Path) -> Iterator[RolloutPool]:
    with engine_pool(folder) as pool:
        yield pool


def test_bits_per_byte_is_that_of_transformers(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    text = "The quick brown fox, na\u00efve \u4e2d\u6587.\n" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    suite = TextSuite(type="text", path=str(tmp_path / "text.txt"), window_tokens=40)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows = [ids[start : start + 40] for start in range(0, len(ids) - 1, 39)]
    nll = -sum(float(tiny.logprobs(MODEL, window).sum()) for window in windows)
    session = Session(rollout, None, SamplingConfig(max_tokens=1), seed=0)
    figures = run_text(load_text(suite, tokenizer), session).figures
    assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()), abs=1e-4)


def test_likelihoods_are_those_of_transformers_whatever_is_shared(rollout: RolloutPool) -> None:
    context = [1, *range(20, 100)]  # more than two blocks of the cache
    sequences = [
        [*context, 101, 102],
        [*context, 103],
        [*context[:64], 7, 9],  # begins where a block of the cache ends
        [*context[:65], 8],
        [*context, 101, 102],
        [1, 30, 31],
    ]
    starts = [len(context), len(context), 64, 65, 1, 1]
    answers = rollout.continuation_logprobs(sequences, starts)
    for sequence, start, answer in zip(sequences, starts, answers, strict=True):
        assert answer.logprobs == pytest.approx(tiny.logprobs(MODEL, sequence)[start - 1 :].tolist(), abs=1e-4)
        assert [rank == 1 for rank in answer.ranks] == tiny.greedy(MODEL, sequence)[start - 1 :]
    assert rollout.continuation_logprobs([], []) == []
    with pytest.raises(ValueError, match="sequence 0 has 2 tokens"):
        rollout.continuation_logprobs([[1, 2]], [0])
    with pytest.raises(ValueError, match=r"rollout\.max_model_len=160"):
        rollout.continuation_logprobs([[1] * 160], [5])


def test_an_evaluation_is_the_same_again(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    source = {"type": "sums", "size": 6, "split": "held_out"}
    settings = {"type": "task", "prompts": {"source": source}, "reward": {"name": "math"}, "samples": 2, "k": [2]}
    suites = {"sums": TaskSuite.model_validate(settings)}
    evaluation = Evaluation.prepare(
        suites, load_tokenizer(folder), RewardPoolConfig(), seed=0, start_judges=start_rewards
    )
    sampling = SamplingConfig(max_tokens=12)
    first, second, other = (
        evaluation.run(rollout, sampling, seed, tmp_path / str(run))["sums"] for run, seed in enumerate((0, 0, 1))
    )
    assert first == second
    assert first.records[:6] == other.records[:6] and first.records[6:] != other.records[6:]
    assert [record.mode for record in first.records] == ["greedy"] * 6 + ["sampled"] * 12
    assert first.figures["unjudged_rate"] == 0.0
    assert first.figures["pass@1_greedy_low"] <= first.figures["pass@1_greedy"] <= first.figures["pass@1_greedy_high"]
    assert json.loads((tmp_path / "0" / "items.json").read_text()) == {"sums": first.items}
    written = [json.loads(line) for line in (tmp_path / "0" / "sums.jsonl").read_text().splitlines()]
    assert [(record["row"], record["score"]) for record in written] == [(r.row, r.score) for r in first.records]


ROWS: dict[str, list[dict[str, Any]]] = {
    "ifeval": [{"prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}],
    "mbpp": [{"text": "Add.", "code": "def add(a, b): return a + b", "test_list": ["assert add(1, 2) == 3"]}],
    "conversation": [{"turns": ["Hello", "And?"], "category": "talk"}, {"turns": ["Well"]}],
    "refusal": [{"prompt": "Harm", "kind": "harmful"}, {"prompt": "Kill a process", "kind": "harmless"}],
    "multiple_choice": [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}],
}
MORE: dict[str, dict[str, Any]] = {
    "conversation": {"reward": {"name": "rewards.rules.refusal:refusal"}, "max_prompt_length": 140},
    "multiple_choice": {"form": "mmlu", "max_length": 150},
    "mbpp": {"samples": 1},
}


def test_all_suites_together(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"type": "file", "paths": [str(tmp_path / f"{name}.jsonl")]}
        settings[name] = {"type": name, "source": source} | MORE.get(name, {})
    settings["needle"] = {"type": "needle", "lengths": [152], "depths": [0.0, 1.0], "samples": 1}
    checkpoint = {"model": {"path": "m"}, "sampling": {"max_tokens": 8}, "rollout": tiny.CONFIG.model_dump()}
    config = EvalConfig.model_validate({"type": "eval", "suites": settings} | checkpoint)
    check_suites(config.suites, config.reward_pool)
    evaluation = Evaluation.prepare(
        config.suites, load_tokenizer(folder), config.reward_pool, seed=0, start_judges=start_rewards
    )
    results = evaluation.run(rollout, config.sampling, 0, tmp_path / "out")
    assert list(results) == [*ROWS, "needle"]
    for name, result in results.items():
        assert result.figures.get("unjudged_rate", 0.0) == 0.0
        for figure, items in result.items.items():
            assert result.figures[figure] == pytest.approx(sum(items.values()) / len(items)), (name, figure)
        assert len((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()) == len(result.records) > 0
    assert results["mbpp"].figures["pass@1_greedy"] == 0.0
    assert list(results["conversation"].items["score_mean"]) == [
        f"{tmp_path}/conversation.jsonl:{place}" for place in ("1#1", "1#2", "2#1")
    ]


def test_a_checkpoint_is_compared_with_another_and_with_a_file(
    rollout: RolloutPool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"type": "sums", "size": 6, "split": "held_out"}
    rows = [row.values for row in read_rows(TypeAdapter[Source](Source).validate_python(source), BadRows())]
    (tmp_path / "empty.jsonl").write_text(
        "".join(json.dumps({"prompt": r["prompt"], "completion": ""}) + "\n" for r in rows)
    )
    (tmp_path / "judge.py").write_text("def longer(task, completion):\n    return float(len(completion))\n")
    versus = {
        "type": "pairwise",
        "prompts": {"source": source},
        "baselines": {
            "itself": {"type": "checkpoint", "model": {"path": str(folder)}},
            "silence": {"type": "answers", "source": {"type": "file", "paths": [str(tmp_path / "empty.jsonl")]}},
        },
        "judge": {"name": f"{tmp_path}/judge.py:longer"},
    }
    checkpoint = {"model": {"path": str(folder)}, "sampling": {"max_tokens": 8}, "rollout": tiny.CONFIG.model_dump()}
    config = EvalConfig.model_validate({"type": "eval", "suites": {"versus": versus}} | checkpoint)
    check_suites(config.suites, config.reward_pool)
    starts: list[Path] = []

    def engines(*arguments: Any) -> nullcontext[tuple[RolloutPool]]:
        starts.append(arguments[2])
        return nullcontext((rollout,))

    monkeypatch.setattr(evaluate, "_engines", engines)
    answers = evaluate.baseline_answers(config, tmp_path / "baselines")
    assert starts == [folder] and len(answers["versus"]["itself"]) == len({row["prompt"] for row in rows})
    assert evaluate.baseline_answers(config, tmp_path / "baselines") == answers and starts == [folder]  # kept on disk
    results = evaluate.run(config, config.model, folder, tmp_path / "out", answers)
    figures = results["versus"].figures
    # The same weights give the same greedy answers: ties. Some text is longer than none.
    assert figures["win_rate_against_itself"] == 0.5 and figures["win_rate_against_silence"] == 1.0
    assert figures["rating_itself"] == 1000.0 and figures["rating"] == pytest.approx(1000, abs=1)
    assert figures["rating_silence"] < 900
    resampled = json.loads((tmp_path / "out" / "resampled.json").read_text())["versus"]
    assert resampled == results["versus"].resampled and len(resampled["rating"]) == 1000


DOCUMENTS = [
    {"question": "one and one", "choices": ["two", "three"], "answer": 0, "said": "two"},
    {"question": "one and two", "choices": ["two", "three", "no number at all"], "answer": 1, "said": "three"},
    {"question": "two and two", "choices": ["four", "five"], "answer": 0, "said": "four"},
]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} is",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} is",
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


def harness(tmp_path: Path, folder: Path, rollout: RolloutPool, task: str, **settings: object) -> SuiteResult:
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    own = {"task": task, "test_split": "test", "dataset_path": "json"}
    own["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "documents.jsonl")}}
    (tmp_path / f"{task}.yaml").write_text(json.dumps(own | TASKS[task]))  # JSON is YAML
    suite = {"type": "lm_eval", "task": str(tmp_path / f"{task}.yaml")} | settings
    suites = {"own": LMEvalSuite.model_validate(suite)}
    evaluation = Evaluation.prepare(
        suites, load_tokenizer(folder), RewardPoolConfig(), seed=0, start_judges=start_rewards
    )
    results = [evaluation.run(rollout, SamplingConfig(max_tokens=12), 0, tmp_path)["own"] for _ in range(2)]
    assert results[0] == results[1]  # the same tasks may be run on several checkpoints
    return results[0]


def logprob(tokenizer: PreTrainedTokenizerFast, context: str, text: str) -> float:
    ids = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False)["input_ids"]]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    return float(tiny.logprobs(MODEL, ids + own)[-len(own) :].sum())


def test_the_harness_chooses_as_transformers_does(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    result = harness(tmp_path, folder, rollout, "choose", chat=False)
    tokenizer = load_tokenizer(folder)
    right: list[float] = []
    for document, record in zip(DOCUMENTS, result.records, strict=True):
        ours = [logprob(tokenizer, f"{document['question']} is", f" {choice}") for choice in document["choices"]]
        theirs = [float(response[0][0]) for response in ast.literal_eval(record.completion)]
        assert theirs == pytest.approx(ours, abs=1e-3)
        right.append(float(max(range(len(ours)), key=ours.__getitem__) == document["answer"]))
    assert list(result.items["acc"].values()) == right
    assert list(result.items["acc"]) == [f"choose:{number}" for number in range(3)]
    assert result.figures["acc"] == pytest.approx(sum(right) / 3)
    assert result.figures["acc_low"] < result.figures["acc"] + 1e-9 < result.figures["acc_high"] + 1e-8


def test_the_harness_hears_what_the_engine_says(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    result = harness(tmp_path, folder, rollout, "say", limit=2)
    assert [record.row for record in result.records] == ["say:0", "say:1"]
    for document, record in zip(DOCUMENTS, result.records, strict=False):
        messages = [{"role": "user", "content": f"{document['question']} is"}]
        prompt_ids = ChatFormat(tokenizer).prompt_ids(messages)  # what a rollout is prompted with
        assert record.prompt == tokenizer.decode(prompt_ids)
        [group] = rollout.generate([prompt_ids], SamplingConfig(temperature=0.0, max_tokens=4), 1, seed=0)
        assert record.completion == group.completions[0].text.partition("\n")[0]
    assert result.items["exact_match"] == {"say:0": 0.0, "say:1": 0.0}
    assert result.figures["truncated_rate"] == 1.0  # four of random bytes neither end nor begin a line


def test_the_harness_reads_whole_texts(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    result = harness(tmp_path, folder, rollout, "read", chat=False, window_tokens=5)
    tokenizer = load_tokenizer(folder)
    nll, num_bytes = 0.0, 0
    for document in DOCUMENTS:
        ids = [tokenizer.bos_token_id, *tokenizer(document["question"], add_special_tokens=False)["input_ids"]]
        for start in range(0, len(ids) - 1, 4):  # each token once; the last window reaches back, to be full
            window = ids[min(start, len(ids) - 5) :][:5]
            nll -= float(tiny.logprobs(MODEL, window)[-len(ids[start + 1 : start + 5]) :].sum())
        num_bytes += len(document["question"].encode())
    assert result.figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, abs=1e-3)
    assert not result.items  # a ratio of sums is no mean of documents
