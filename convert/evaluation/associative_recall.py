"""Associative recall as one smooth number: the likelihood of the value that belongs to a key."""

import dataclasses

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.evaluation.scoring import by_likelihood, fitting
from convert.evaluation.tasks import TASKS

PROMPTS = 48  # of 4, 8 and 16 keys in turn (ours)
SEED = 2603_26556  # of the keys and values; evaluations draw others


@torch.no_grad()
def recall_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the mean of -ln p(right value | prompt) in nats per prompt, p among all continuations: a model that ranks
    values no better than chance can still tell those of the table from others. The prompts are those of the task
    `keys`. Raises UserError where none fits the model's positions."""
    task = TASKS["keys"]
    items = [
        dataclasses.replace(item, choices=(item.choices[item.gold],), gold=0) for item in task.items(PROMPTS, SEED)
    ]
    items = [items[i] for i in fitting(model, tokenizer, task, items)]
    if not items:
        raise UserError(
            f"Associative recall is measured on prompts of {task.about}, and none fits the"
            f" {model.config.max_position_embeddings:,} positions of this model. Rank by kl."
        )
    nats = [answer.nats[0] for answers in by_likelihood(model, tokenizer, task, items) for answer in answers]
    return -sum(nats) / len(nats)
