"""What a reward model reads: one conversation and one answer to it, as token ids.

Training, evaluation and serving all come through here, so that they score the same tokens. The prompt is what the
policy is prompted with; the answer is its text and the one token that ends a turn, at which the score is read.
"""

from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import ChatFormat
from pipeline.data.messages import Message


def scored_ids(messages: list[Message], answer: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of the conversation up to the answer, and of the answer, which ends with the end of its turn.

    The answer's text is taken as it is, whatever a template would trim of it, and an answer that was cut short gets its
    end too. What spells a special token in it is read as text: no answer can forge a turn or a second end. Raises
    BadRowError where the chat template refuses the conversation, ValueError for a tokenizer without a usable one.
    """
    chat, end = _format(tokenizer, str(tokenizer.chat_template))
    answer_ids = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return chat.prompt_ids(messages), [*answer_ids, end]


def with_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tokenizer`, its pad token changed where it could be taken for the end of an answer.

    `transformers` reads the score of a padded batch at the last token that is not padding. So a pad token that is also
    the end of a turn or of a text gives way to the first special token that is neither. Raises ValueError where there
    is no other.
    """
    _, end = _format(tokenizer, str(tokenizer.chat_template))
    taken = (end, tokenizer.eos_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        free = [index for index in special if index not in taken]
        if not free:
            raise ValueError(
                "the tokenizer has no special token that could pad, apart from those that end a turn or a text; add "
                "one to the checkpoint's tokenizer as its pad_token"
            )
        first = min(free, key=lambda index: (index == tokenizer.bos_token_id, index))  # the beginning's last of all
        tokenizer.pad_token = tokenizer.added_tokens_decoder[first].content
    return tokenizer


@lru_cache(maxsize=8)
def _format(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> tuple[ChatFormat, int]:
    """The tokenizer's chat format, and the id that ends an answer. The template is an argument for the cache's sake."""
    chat = ChatFormat(tokenizer)
    ends = chat.end_ids()
    if not ends:
        raise ValueError("the chat template ends an answer with no special token; take one that does")
    return chat, ends[0]
