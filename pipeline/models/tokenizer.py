"""Tokenizers: loaded with a guard that they keep text whole, or made fresh from bytes."""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.weights.resolve import template_file

OTHER_MEDIA = re.compile("image|audio|video", re.IGNORECASE)

# In normal form C, since good tokenizers normalise to it.
ROUND_TRIP_PROBE = "Hello  world,\n\n12345 x 3.14 = ?\t na\u00efve \u4e2d\u6587 \U0001f642 don't\n  if x:\n    y"

BYTE_SPECIAL_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|spare_0|>",
    "<|spare_1|>",
)
BYTE_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {%- elif message['role'] in ['user', 'system'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] }}
    {%- else %}
        {{- raise_exception("role '" + message['role'] + "' is not one of user, assistant, system") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def load_tokenizer(folder_or_name: str | Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, with `chat_template`, a Jinja file or the name of a shipped template, in place of
    its own template if one is given.

    Built from its tokenizer.json alone, as engines do: the class that a tokenizer_config.json names may read another
    one from it.

    Raises ValueError when there is no such tokenizer or template, when the tokenizer has tokens that the model's
    embedding has no row for, or when it does not give a probe of digits, spaces and several scripts back as it was.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder_or_name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer in '{folder_or_name}': give a checkpoint's folder or hub name ({error})"
        ) from error
    came_back = _round_trip(tokenizer)
    if came_back != ROUND_TRIP_PROBE:
        raise ValueError(
            f"the tokenizer of '{folder_or_name}' loses text: {ROUND_TRIP_PROBE!r} comes back as {came_back!r}; train "
            "with another tokenizer, one with byte fallback"
        )
    _refuse_larger(tokenizer, Path(folder_or_name))
    if chat_template is not None:
        tokenizer.chat_template = template_file(chat_template).read_text(encoding="utf-8")
    return tokenizer


def _refuse_larger(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Raise ValueError for a token whose id is no row of the embedding that config.json describes.

    Placeholders of images and the like are excepted: models for text alone share a tokenizer with siblings that see
    (Gemma 3 1B). In a text they are refused as any special token is.
    """
    file = folder / "config.json"
    described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = described.get("vocab_size") or (described.get("text_config") or {}).get("vocab_size")
    if rows is None:
        return
    beyond = [
        token for token, index in tokenizer.get_vocab().items() if index >= rows and not OTHER_MEDIA.search(token)
    ]
    if beyond:
        raise ValueError(
            f"the tokenizer of '{folder}' has {len(beyond)} tokens beyond the model's vocab_size={rows} "
            f"({', '.join(sorted(beyond)[:3])}): resize the model's embedding (model.resize_token_embeddings) and save "
            "it with the tokenizer, or take those tokens out"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 264 ids: 8 special tokens, then the 256 bytes in order. It needs no training and loses nothing.

    A conversation is `<bos>`, then `<|user|>text` and `<|assistant|>text<eos>` in turns.
    """
    vocabulary = {token: index for index, token in enumerate(BYTE_SPECIAL_TOKENS)}
    vocabulary |= {character: len(vocabulary) + byte for byte, character in _byte_characters().items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=BYTE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    """Byte -> the character byte-level BPE writes for it: itself where printable, else the next one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}
    return dict(sorted(shown.items()))


def _round_trip(tokenizer: PreTrainedTokenizerFast) -> str:
    ids = tokenizer(ROUND_TRIP_PROBE, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
