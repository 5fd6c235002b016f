"""Score texts with the checkpoint of a reward model, in this process."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.model import AnyDtype
from pipeline.data.messages import Message
from pipeline.data.scored import scored_ids
from pipeline.data.trees import MicroBatch, micro_batch, scored_tree, shard_indices
from pipeline.models.attention import Layout
from pipeline.models.score import ScoreModel, refuse_other_scores
from pipeline.models.tokenizer import load_tokenizer
from pipeline.weights.reward_model import load_score_model


class Scorer:
    """A reward model on this process's device.

    Example:

        scorer = Scorer(Path("runs/demo/rm/hf"), "float32", batch_tokens=4096)
        scorer.scores([([{"role": "user", "content": "2+2?"}], "4")])
    """

    def __init__(self, folder: Path, dtype: AnyDtype, batch_tokens: int) -> None:
        """Load the checkpoint. A forward pass takes at most `batch_tokens` tokens, or one longer conversation.

        Raises ValueError for a checkpoint that is no reward model, and for a tokenizer that can't be used.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = load_tokenizer(folder)
        model = load_score_model(folder, dtype)
        refuse_other_scores(model)
        self._model = ScoreModel(model).to(self.device).eval()
        self._batch_tokens = batch_tokens

    def scores(self, items: Sequence[tuple[list[Message], str]]) -> list[float]:
        """Score the answer of each (conversation, answer), in the order of `items`.

        Answers to the same conversation share its computation. The other items of a call change a score only in its
        last digits. Raises BadRowError for a conversation that the chat template refuses.
        """
        answers: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (messages, answer) in enumerate(items):
            prompt_ids, answer_ids = scored_ids(messages, answer, self._tokenizer)
            answers.setdefault(tuple(prompt_ids), []).append((index, answer_ids))
        trees = [scored_tree(list(prompt_ids), [ids for _, ids in group]) for prompt_ids, group in answers.items()]
        indices = [[index for index, _ in group] for group in answers.values()]
        scores = [0.0] * len(items)
        rows = shard_indices(trees, num_ranks=1, micro_batch_tokens=self._batch_tokens)[0] if trees else []
        for row in rows:
            values = self._forward(micro_batch([trees[i] for i in row])).tolist()
            for index, value in zip([index for i in row for index in indices[i]], values, strict=True):
                scores[index] = value
        return scores

    def _forward(self, row: MicroBatch) -> Tensor:
        token_ids_T, last_N = (torch.from_numpy(x).to(self.device) for x in (row.token_ids_T, row.source_N))
        with torch.inference_mode():
            return self._model(token_ids_T, Layout(row.lengths, row.parents), last_N)
