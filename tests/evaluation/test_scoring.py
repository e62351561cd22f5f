"""The two scoring methods: three models whose scores are known, batches against one by one, and log p by hand."""

import pytest
import torch

from convert.evaluation import statistics
from convert.evaluation.scoring import SCORING_METHODS, batches, by_generation, by_likelihood, cut, fitting, prompt_ids
from convert.evaluation.tasks import TASKS
from convert.mixers import MIXERS
from convert.models.swap import swap
from tests.conftest import options_of, tiny_teacher
from tests.evaluation.scripted import Scripted, chatty_tokenizer, knowing

COUNT = 6


@pytest.fixture(scope="module")
def tokenizer():
    return chatty_tokenizer()


def answers_of(model, tokenizer, task, items):
    return {
        name: [a for batch in method(model, tokenizer, task, items) for a in batch]
        for name, method in SCORING_METHODS.items()
    }


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_answers_everything_correctly(name, tokenizer):
    task = TASKS[name]
    items = task.items(COUNT, 0)
    oracle = knowing(tokenizer, [(task, items)])
    for answers in answers_of(Scripted(lambda ids, _: oracle(ids), len(tokenizer)), tokenizer, task, items).values():
        row = statistics.score(items, answers, lettered=task.lettered)
        assert (row["score"], row["low"], row["high"], row["unparsable"], row["n"]) == (1, 1, 1, 0, COUNT)
        assert row.get("stickiness", 0) == 0


def test_who_always_says_a_is_caught(tokenizer):
    task = TASKS["facts"]
    items = task.items(COUNT, 0)
    (a,) = tokenizer("A", add_special_tokens=False)["input_ids"]
    for answers in answers_of(
        Scripted(lambda ids, _: 0 if ids[-1] == a else a, len(tokenizer)), tokenizer, task, items
    ).values():
        row = statistics.score(items, answers, lettered=True)
        assert row["score"] == 0.25 and row["stickiness"] == 1 and row["letters"]["A"] == 1


@pytest.mark.parametrize("name", ["names", "copying", "sums"])
def test_who_ranks_well_and_writes_rubbish_shows_the_gap(name, tokenizer):
    task = TASKS[name]
    items = task.items(COUNT, 0)
    oracle = knowing(tokenizer, [(task, items)])
    (rubbish,) = tokenizer("!", add_special_tokens=False)["input_ids"]
    good = answers_of(Scripted(lambda ids, _: oracle(ids), len(tokenizer)), tokenizer, task, items)
    bad = answers_of(
        Scripted(lambda ids, is_writing: rubbish if is_writing else oracle(ids), len(tokenizer)), tokenizer, task, items
    )
    assert statistics.gap(items, good["likelihood"], bad["likelihood"])["gap"] == 0
    found = statistics.gap(items, good["generation"], bad["generation"])
    assert found["gap"] == found["low"] == 1
    row = statistics.score(items, bad["generation"])
    assert row["unparsable"] == 1 and row["repetition"] > 0.6 and row["distinct_2"] < 0.1
    assert statistics.divergence(good["generation"], bad["generation"]) == {"same_text": 0.0, "first_divergence": 0.0}


@pytest.mark.parametrize("name", ["names", "indentation", "needle"])
def test_batches_change_nothing(name):
    from convert.models.catalog import NANO
    from convert.models.loading import load_teacher

    nano, task = load_teacher(str(NANO)), TASKS[name]
    items = task.items(COUNT, 0)
    together = [a for batch in by_generation(nano.model, nano.tokenizer, task, items) for a in batch]
    alone = [a for batch in by_generation(nano.model, nano.tokenizer, task, items, rows=1) for a in batch]
    assert {(a.item, a.prediction, a.text) for a in together} == {(a.item, a.prediction, a.text) for a in alone}


@pytest.mark.parametrize("mixer", [None, *MIXERS])
@pytest.mark.parametrize("name", ["keys", "copying"])
def test_log_p_is_that_of_the_choices_tokens(tokenizer, mixer, name):
    model, task = tiny_teacher("gpt_neox", vocab_size=len(tokenizer)), TASKS[name]
    if mixer:
        model = swap(model, mixer, options_of(mixer), (0, 2))
    items = task.items(2, 0)
    for answer in (a for batch in by_likelihood(model, tokenizer, task, items) for a in batch):
        item = items[answer.item]
        for choice, nats in zip(item.choices, answer.nats, strict=True):
            prompt = prompt_ids(tokenizer, task, item.prompt)
            ids = torch.tensor([prompt + tokenizer(choice)["input_ids"]])
            logs = model(ids).logits.log_softmax(-1)[0]
            by_hand = sum(logs[at - 1, ids[0, at]].item() for at in range(len(prompt), ids.shape[1]))
            assert nats == pytest.approx(by_hand, rel=1e-5)


def test_items_that_do_not_fit_are_left_out(tokenizer):
    task, model = TASKS["needle"], tiny_teacher("gpt_neox", vocab_size=len(tokenizer))
    items = task.items(8, 0)
    assert 0 < len(fitting(model, tokenizer, task, items)) < 8  # of 512 positions


def test_batches_are_of_similar_lengths_and_bounded():
    found = list(batches([5, 100, 7, 50, 6], rows=2, tokens=120))
    assert found == [[1], [3, 2], [4, 0]]
    assert list(batches([5, 100, 7, 50, 6], padding=3)) == [[1], [3], [2, 4, 0]]


def test_a_stop_counts_after_the_first_word():
    assert cut("\n  name\nmore", ("\n",)) == "\n  name" and cut("all of it", ()) == "all of it"


def test_a_models_own_settings_do_not_change_what_it_writes():
    from convert.models.catalog import NANO
    from convert.models.loading import load_teacher

    nano, task = load_teacher(str(NANO)), TASKS["copying"]
    items = task.items(COUNT, 0)

    def texts():
        return {
            answer.item: answer.text
            for batch in by_generation(nano.model, nano.tokenizer, task, items)
            for answer in batch
        }

    before, settings = texts(), nano.model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size = 1.5, 2
    assert texts() == before and nano.model.generation_config is settings


def test_who_can_think_is_asked_not_to(tokenizer):
    thinking = chatty_tokenizer()
    thinking.chat_template += "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    task = TASKS["sums"]
    (item,) = task.items(1, 0)
    assert prompt_ids(thinking, task, item.prompt) == prompt_ids(tokenizer, task, item.prompt)


@pytest.mark.parametrize("its_own", [None, 7, [7, 8]])
def test_a_text_ends_where_the_model_or_the_tokenizer_says(tokenizer, its_own):
    """Rows that ended write nothing while others go on."""
    task = TASKS["forms"]
    items = task.items(4, 0)
    longest = max(items, key=lambda item: len(tokenizer(item.answer)["input_ids"]))
    oracle = knowing(tokenizer, [(task, items)])
    model = Scripted(lambda ids, _: oracle(ids), len(tokenizer))  # its end is 0, the tokenizer's
    model.generation_config.eos_token_id = its_own
    answers = [a for batch in by_generation(model, tokenizer, task, items) for a in batch]
    assert all(a.correct and 0 not in a.tokens for a in answers) and longest.answer in {a.text for a in answers}
