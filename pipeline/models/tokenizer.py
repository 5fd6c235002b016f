"""Load tokenizers that keep text unchanged, and build one from bytes."""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.data.template_files import template_file

_OTHER_MEDIA = re.compile("image|audio|video", re.IGNORECASE)

# The probe is in normal form C because good tokenizers normalise to it.
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
    """Load the tokenizer of a checkpoint from its tokenizer.json, as engines do.

    `chat_template`, a Jinja file or the name of a shipped template, replaces its own template. Raises ValueError when
    there is no such tokenizer or template, when a token has no row in the model's embedding, and when decoding changes
    a probe of digits, spaces and several scripts.

    Example: `load_tokenizer("runs/demo/sft/hf", chat_template="chatml")`
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder_or_name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer in '{folder_or_name}': give a checkpoint's folder or hub name ({error})"
        ) from error
    ids = tokenizer(ROUND_TRIP_PROBE, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if decoded != ROUND_TRIP_PROBE:
        raise ValueError(
            f"the tokenizer of '{folder_or_name}' loses text: {ROUND_TRIP_PROBE!r} comes back as {decoded!r}; train "
            "with another tokenizer, one with byte fallback"
        )
    _refuse_larger(tokenizer, Path(folder_or_name))
    if chat_template is not None:
        tokenizer.chat_template = template_file(chat_template).read_text(encoding="utf-8")
    return tokenizer


def _refuse_larger(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Raise ValueError for a token without a row in the embedding that config.json describes.

    Placeholders of images and the like are allowed, because text models share a tokenizer with multimodal ones
    (Gemma 3 1B). As special tokens they are refused in texts anyway.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if rows is None:
        return
    beyond = [
        token for token, index in tokenizer.get_vocab().items() if index >= rows and not _OTHER_MEDIA.search(token)
    ]
    if beyond:
        raise ValueError(
            f"the tokenizer of '{folder}' has {len(beyond)} tokens beyond the model's vocab_size={rows} "
            f"({', '.join(sorted(beyond)[:3])}): resize the model's embedding (model.resize_token_embeddings) and save "
            "it with the tokenizer, or take those tokens out"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 264 ids: 8 special tokens, then the 256 bytes in order.

    A conversation is `<bos>`, then `<|user|>text` and `<|assistant|>text<eos>` in turns.

    Example: `byte_tokenizer()("hi")["input_ids"]` is `[112, 113]`.
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
    """Map each byte to its character in byte-level BPE: itself if printable, else the next one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}
    return dict(sorted(shown.items()))
