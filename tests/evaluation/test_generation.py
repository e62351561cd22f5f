"""The one decoder writes what transformers' own generate() writes, and scores plain models of transformers, too."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert.data.prompts import left_padded
from convert.evaluation import generation
from convert.evaluation.final_metrics import final_metrics
from convert.evaluation.half_lives import half_lives
from convert.evaluation.monitor import Monitor
from convert.evaluation.runner import evaluate_tasks
from convert.evaluation.tasks import TASKS
from convert.mixers import MIXERS
from convert.models.catalog import NANO
from convert.models.loading import load_teacher
from convert.models.swap import swap
from tests.conftest import FAMILIES, options_of, tiny_teacher, token_ids


class Tokens:
    """A tokenizer of which only the special ids matter."""

    pad_token_id, eos_token_id = 0, 7


@pytest.mark.parametrize("mixer", [None, *MIXERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_generate_writes(family, mixer):
    """In a padded batch, with a row that ends early, and with a second call's settings that would change the text."""
    model = tiny_teacher(family)
    if mixer is not None:
        model = swap(model, mixer, options_of(mixer), (0, 2)).eval()
    prompts = [ids[:length] for ids, length in zip(token_ids(3, 40).tolist(), (40, 9, 23), strict=True)]
    ids, mask = left_padded(prompts, 0, model.device)
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    free = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=[7], **settings)[:, 40:]
    model.generation_config.repetition_penalty = 3.0
    assert generation.generate(model, Tokens, prompts, 12) == [_cut(row, {0, 7}) for row in free.tolist()]
    end = free[1, 3].item()  # a token that comes early
    model.generation_config.eos_token_id = end
    rows = generation.generate(model, Tokens, prompts, 12)
    assert rows == [_cut(row, {0, 7, end}) for row in free.tolist()] and len(rows[1]) <= 3


def _cut(row, ends):
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


def test_long_prompts_go_in_pieces_with_their_padding(monkeypatch):
    model = swap(tiny_teacher("llama"), "gate-swa", options_of("gate-swa"), (0, 2)).eval()
    prompts = [ids[:length] for ids, length in zip(token_ids(2, 70).tolist(), (70, 41), strict=True)]
    ids, mask = left_padded(prompts, 0, model.device)
    whole, _ = generation.prefill(model, ids, mask)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 32)
    pieces, cache = generation.prefill(model, ids, mask)
    assert (whole - pieces).abs().max() < 1e-4 and cache.get_seq_length() == 70


def test_a_streamer_sees_the_prompt_and_every_token():
    class Heard:
        def __init__(self):
            self.values, self.is_complete = [], False

        def put(self, value):
            self.values.append(value.tolist())

        def end(self):
            self.is_complete = True

    model, heard = tiny_teacher("llama"), Heard()
    (row,) = generation.generate(model, Tokens, [[5, 6]], 4, streamer=heard)
    assert heard.values[0] == [[5, 6]] and [token for (token,) in heard.values[1:]][: len(row)] == row
    assert heard.is_complete


def test_drawn_tokens_follow_the_seed_and_the_temperature():
    model = tiny_teacher("llama")

    def text(seed, temperature):
        torch.manual_seed(seed)
        return generation.generate(model, Tokens, [[5, 6]], 16, choose=generation.drawn(temperature))

    assert text(0, 2.0) == text(0, 2.0) != text(1, 2.0)
    assert text(0, 1e-6) == generation.generate(model, Tokens, [[5, 6]], 16)


@pytest.mark.parametrize("mixer", MIXERS)
def test_half_lives_are_those_of_layers_that_decay(mixer):
    from convert.data.batches import Batch

    student = swap(tiny_teacher("llama"), mixer, options_of(mixer), (0, 2)).eval()
    ids = token_ids(2, 33)
    found = half_lives(student, [Batch(ids[:, :-1], ids[:, 1:], torch.arange(32)[None].expand(2, -1))])
    assert list(found) == (["0", "2"] if MIXERS[mixer].decays else [])
    assert half_lives(tiny_teacher("llama"), []) == {}


@pytest.mark.filterwarnings("ignore")
def test_a_plain_model_of_transformers_can_be_the_student(tmp_path, monkeypatch):
    """As a step makes it that trains one from a configuration: it has no converted layer."""
    from convert.data.corpus import corpus
    from convert.data.text import tokenize

    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path))
    nano = load_teacher(str(NANO))
    config = copy.deepcopy(nano.model.config)
    config.num_hidden_layers = 1
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(config).eval()
    text = tokenize(corpus("stdlib"), nano.tokenizer)
    from convert.evaluation import final_metrics as module

    monkeypatch.setattr(module, "PREFILL_SECONDS", 0.0)
    batches = module.held_out(text, 512, 64, 256)
    found = final_metrics(student, nano, text, batches)
    assert found.perplexity.student > found.perplexity.teacher and found.half_lives == {}
    depth = nano.model.config.num_hidden_layers
    assert found.cache_bytes.teacher["1024"] == depth * found.cache_bytes.student["1024"]
    assert found.cache_bytes.formula.student["1024"] == found.cache_bytes.student["1024"]
    assert Monitor(nano, batches)(student)["held_out/generation"] < 0.2
    scores = evaluate_tasks({"teacher": nano.model, "student": student}, nano.tokenizer, [TASKS["keys"]], limit=2)
    assert len(scores.rows) == 4 and len(scores.gaps) == 2
