"""Tokenise a conversation and an answer for a reward model.

Training, evaluation and serving all use this file, so they score the same tokens. The prompt is the policy's prompt.
The answer is its text and the token that ends a turn, at which the score is read.
"""

from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import ChatFormat
from pipeline.data.messages import Message


def scored_ids(messages: list[Message], answer: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of the answer with the token that ends its turn.

    The answer's text is not trimmed as a template might, and an answer that was cut short gets an end too. Special
    tokens in it are read as text, so no answer can forge a turn or a second end. Raises BadRowError if the template
    refuses the conversation, and ValueError for a tokenizer without a usable template.
    """
    chat, end = _format(tokenizer, str(tokenizer.chat_template))
    answer_ids = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return chat.prompt_ids(messages), [*answer_ids, end]


def with_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Change the pad token of `tokenizer` if it also ends a turn or a text, and return `tokenizer`.

    `transformers` reads the score of a padded batch at the last token that is not padding. The first special token that
    ends neither becomes the pad token. Raises ValueError if there is none.
    """
    _, end = _format(tokenizer, str(tokenizer.chat_template))
    ends = (end, tokenizer.eos_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        free = [index for index in special if index not in ends]
        if not free:
            raise ValueError(
                "the tokenizer has no special token that could pad, apart from those that end a turn or a text; add "
                "one to the checkpoint's tokenizer as its pad_token"
            )
        first = min(free, key=lambda index: (index == tokenizer.bos_token_id, index))  # bos only if there is no other
        tokenizer.pad_token = tokenizer.added_tokens_decoder[first].content
    return tokenizer


@lru_cache(maxsize=8)
def _format(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> tuple[ChatFormat, int]:
    """Return the chat format and the id that ends an answer; `chat_template` is part of the cache's key."""
    chat = ChatFormat(tokenizer)
    ends = chat.end_ids()
    if not ends:
        raise ValueError("the chat template ends an answer with no special token; take one that does")
    return chat, ends[0]
