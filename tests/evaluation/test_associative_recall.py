"""The loss of associative recall is what the scoring of the task `keys` says of the right values."""

import copy

import pytest

from convert import load_teacher
from convert.core.errors import UserError
from convert.evaluation import associative_recall
from convert.evaluation.scoring import by_likelihood
from convert.evaluation.tasks import TASKS
from convert.models.swap import swap


def test_padded_batches_give_what_one_prompt_at_a_time_gives(monkeypatch):
    monkeypatch.setattr(associative_recall, "PROMPTS", 6)
    monkeypatch.setattr(associative_recall, "BATCH_TOKENS", 400)
    teacher = load_teacher("neox-nano")
    task, tokenizer = TASKS["keys"], teacher.tokenizer
    items = task.items(6, associative_recall.SEED)
    for model in (teacher.model, swap(copy.deepcopy(teacher.model), "kda", layers=(0, 3))):
        nats = tokens = 0
        for (answer,) in by_likelihood(model, tokenizer, task, items):
            item = items[answer.item]
            nats -= answer.nats[item.gold]
            tokens += len(tokenizer(item.prompt + item.choices[item.gold])["input_ids"])
            tokens -= len(tokenizer(item.prompt)["input_ids"])
        assert associative_recall.recall_loss(model, tokenizer) == pytest.approx(nats / tokens, rel=1e-3)


def test_a_model_with_few_positions_is_refused():
    teacher = load_teacher("neox-nano")
    teacher.model.config.max_position_embeddings = 16
    with pytest.raises(UserError, match="none fits the 16 positions of this model. Rank by kl"):
        associative_recall.recall_loss(teacher.model, teacher.tokenizer)
