"""Suites of texts, scored by their likelihood."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerFast

from configs.evaluation import TextSuite
from pipeline.evaluation.statistics import bits_per_byte
from pipeline.evaluation.suites import Session, SuiteResult, batched_likelihoods


@dataclass(frozen=True, slots=True)
class Text:
    """A text in windows of tokens. Each window starts with the last token of the one before and scores the others."""

    name: str
    windows: list[list[int]]
    window_names: list[str]
    """First token and scored characters of each window, so that equal names mean equal windows."""
    num_bytes: int


def load_text(suite: TextSuite, tokenizer: PreTrainedTokenizerFast) -> Text:
    """Load the windows of a UTF-8 file.

    The first token is predicted from the beginning-of-sequence token; without one in the tokenizer it is not scored,
    and its bytes don't count. Raises ValueError for a file that is missing, empty, not UTF-8, a single token, or not
    reproduced by the tokenizer, whose score would be that of another text.
    """
    path = Path(suite.path)
    text = read_utf8(path)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids = cast(list[int], encoding["input_ids"])
    _check_unchanged(path, text, tokenizer, token_ids)
    ends = [end for _, end in cast(list[tuple[int, int]], encoding["offset_mapping"])]
    skipped = ends[0]
    if tokenizer.bos_token_id is not None:
        token_ids, ends, skipped = [tokenizer.bos_token_id, *token_ids], [0, *ends], 0
    if len(token_ids) < 2:
        raise ValueError(f"path='{path}' is a single token with nothing before it; give a longer text")
    starts = range(0, len(token_ids) - 1, suite.window_tokens - 1)
    windows = [token_ids[start : start + suite.window_tokens] for start in starts]
    names = [
        f"{path.name}:{start}:{ends[start]}-{ends[start + len(window) - 1]}"
        for start, window in zip(starts, windows, strict=True)
    ]
    return Text(path.name, windows, names, len(text[skipped:].encode()))


def read_utf8(path: Path) -> str:
    """Read a text file as it is, line ends included. Raises ValueError for a missing file and for other encodings."""
    if not path.is_file():
        raise ValueError(f"path='{path}': no such file; give a UTF-8 text file")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path='{path}' is not UTF-8: {error}; convert the file") from error


def run_text(text: Text, session: Session) -> SuiteResult:
    """Return the text's `bits_per_byte`, and `nll_mean` in nats a token.

    Every token is scored once, from the earlier tokens of its window. An item is a window: its bits over the mean bytes
    of a window, so that the items' mean is the text's bits per byte.
    """
    scored = batched_likelihoods(session.rollout, text.windows, [1] * len(text.windows), text.name)
    nlls = [-sum(likelihood.logprobs) for likelihood in scored]
    bytes_per_window = text.num_bytes / len(text.windows)
    items = {name: nll / (math.log(2) * bytes_per_window) for name, nll in zip(text.window_names, nlls, strict=True)}
    figures = {
        "bits_per_byte": bits_per_byte(sum(nlls), text.num_bytes),
        "nll_mean": sum(nlls) / sum(len(window) - 1 for window in text.windows),
    }
    return SuiteResult(figures, {"bits_per_byte": items})


def _check_unchanged(path: Path, text: str, tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> None:
    if not text:
        raise ValueError(f"path='{path}' is empty")
    decoded = str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if decoded != text:
        same = (pair[0] == pair[1] for pair in zip(text, decoded, strict=False))
        differs = next((index for index, equal in enumerate(same) if not equal), min(len(text), len(decoded)))
        raise ValueError(
            f"path='{path}': the tokenizer changes the text at character {differs}, {text[differs : differs + 20]!r} "
            f"into {decoded[differs : differs + 20]!r}; its bits per byte would be those of another text. "
            "Normalise the file (often Unicode's form C), or take another"
        )
