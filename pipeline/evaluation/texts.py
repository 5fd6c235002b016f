"""The likelihood of a text."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerFast

from configs.evaluation import TextSuite
from pipeline.evaluation.statistics import bits_per_byte
from pipeline.evaluation.suites import Session, SuiteResult, likelihoods


@dataclass(frozen=True, slots=True)
class Text:
    """A text in windows of tokens: each but the first begins with the last token of the one before, and scores those
    after it. `places` name the windows by their first token and the characters they score, so that only equal windows
    have equal names."""

    name: str
    windows: list[list[int]]
    places: list[str]
    num_bytes: int


def load_text(suite: TextSuite, tokenizer: PreTrainedTokenizerFast) -> Text:
    """The windows of a UTF-8 file.

    The very first token is predicted from the beginning-of-sequence token; where the tokenizer has none it is not
    scored, and its bytes don't count. Raises ValueError when the file is missing, empty, not UTF-8, a single token, or
    changed by the tokenizer, which would then be scored on another text.
    """
    path = Path(suite.path)
    if not path.is_file():
        raise ValueError(f"path='{path}': no such file; give a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path='{path}' is not UTF-8: {error}; convert the file") from error
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids = cast(list[int], encoding["input_ids"])
    _check_unchanged(path, text, tokenizer, token_ids)
    ends = [end for _, end in cast(list[tuple[int, int]], encoding["offset_mapping"])]
    skipped = ends[0]
    if tokenizer.bos_token_id is not None:
        token_ids, ends, skipped = [tokenizer.bos_token_id, *token_ids], [0, *ends], 0
    if len(token_ids) < 2:
        raise ValueError(f"path='{path}' is a single token, and nothing comes before it to predict it from")
    starts = range(0, len(token_ids) - 1, suite.window_tokens - 1)
    windows = [token_ids[start : start + suite.window_tokens] for start in starts]
    places = [
        f"{path.name}:{start}:{ends[start]}-{ends[start + len(window) - 1]}"
        for start, window in zip(starts, windows, strict=True)
    ]
    return Text(path.name, windows, places, len(text[skipped:].encode()))


def run_text(text: Text, session: Session) -> SuiteResult:
    """`bits_per_byte` of the text, and `nll_mean` in nats a token.

    Every token is scored once, from the tokens before it in its window. An item is a window: its bits over the mean
    number of bytes of a window, so that the items' mean is the text's bits per byte.
    """
    scored = likelihoods(session.rollout, text.windows, [1] * len(text.windows), text.name)
    nlls = [-sum(likelihood.logprobs) for likelihood in scored]
    bytes_per_window = text.num_bytes / len(text.windows)
    items = {place: nll / (math.log(2) * bytes_per_window) for place, nll in zip(text.places, nlls, strict=True)}
    figures = {
        "bits_per_byte": bits_per_byte(sum(nlls), text.num_bytes),
        "nll_mean": sum(nlls) / sum(len(window) - 1 for window in text.windows),
    }
    return SuiteResult(figures, {"bits_per_byte": items})


def _check_unchanged(path: Path, text: str, tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> None:
    if not text:
        raise ValueError(f"path='{path}' is empty")
    came_back = str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if came_back != text:
        same = (pair[0] == pair[1] for pair in zip(text, came_back, strict=False))
        differs = next((place for place, equal in enumerate(same) if not equal), min(len(text), len(came_back)))
        raise ValueError(
            f"path='{path}': the tokenizer changes the text at character {differs}, {text[differs : differs + 20]!r} "
            f"into {came_back[differs : differs + 20]!r}; its bits per byte would be those of another text. "
            "Normalise the file (often Unicode's form C), or take another"
        )
