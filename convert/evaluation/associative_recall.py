"""Associative recall as one smooth number: the likelihood of the value that belongs to a key."""

import math

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.data.batches import Batch
from convert.data.prompts import encode
from convert.evaluation.perplexity import perplexity
from convert.evaluation.scoring import batches, fitting
from convert.evaluation.tasks import TASKS

PROMPTS = 48  # of 4, 8 and 16 keys in turn (ours)
SEED = 2603_26556  # of the keys and values; evaluations draw others
BATCH_TOKENS = 4096  # padding included (ours)


def recall_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the mean of -ln p over the tokens of the right values, in nats per token, p among all tokens: a model that
    ranks the values of a table no better than chance can still tell them from others. The prompts are those of the task
    `keys`. Raises UserError where none fits the model's positions."""
    task = TASKS["keys"]
    items = task.items(PROMPTS, SEED)
    items = [items[i] for i in fitting(model, tokenizer, task, items)]
    if not items:
        raise UserError(
            f"Associative recall is measured on prompts of {task.about}, and none fits the"
            f" {model.config.max_position_embeddings:,} positions of this model. Rank by kl."
        )
    inputs, labels = [], []
    for item in items:
        whole = torch.tensor(encode(tokenizer, item.prompt, item.choices[item.gold]))
        targets = whole[1:].clone()
        targets[: len(encode(tokenizer, item.prompt)) - 1] = -100
        inputs.append(whole[:-1])
        labels.append(targets)
    groups = batches([len(ids) for ids in inputs], tokens=BATCH_TOKENS)
    return math.log(perplexity(model, [_padded([inputs[i] for i in g], [labels[i] for i in g]) for g in groups]))


def _padded(inputs: list[torch.Tensor], labels: list[torch.Tensor]) -> Batch:
    """Return one batch, padded on the right, where no real token can see it."""
    ids = pad_sequence(inputs, batch_first=True)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return Batch(ids, pad_sequence(labels, batch_first=True, padding_value=-100), positions)
