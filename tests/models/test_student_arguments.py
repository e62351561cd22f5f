"""What a causal language model of transformers can be told, argument by argument: the student does the same, or refuses
by name.

The student whose layers all keep their attention must equal its host; one with mixers must take the same arguments.
"""

import inspect

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
    WatermarkingConfig,
)  # fmt: skip
from transformers.generation.streamers import BaseStreamer
from transformers.utils import TransformersKwargs

from convert.models.cache import CACHE_NAME
from convert.models.student import ConvertedForCausalLM, swap
from tests.conftest import FAMILIES, assert_close, rms, tiny_teacher, token_ids
from tests.models.test_student import CACHED

IDS = token_ids(2, 12)
LABELS = torch.where(token_ids(2, 12, seed=5) % 4 == 0, -100, IDS)
LEFT = torch.ones_like(IDS)
LEFT[0, :3] = 0
POSITIONS = torch.arange(12).expand(2, -1) + 5
PACKED = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
MASK = dict(attention_mask=torch.ones_like(IDS))  # without one, positions from 5 on are an odd document

HONOURED = {
    "nothing": {},
    "attention_mask": dict(attention_mask=LEFT),
    "position_ids": dict(position_ids=POSITIONS) | MASK,
    "packed position_ids": dict(position_ids=PACKED, use_cache=False),
    "labels": dict(labels=LABELS),
    "num_items_in_batch": dict(labels=LABELS, num_items_in_batch=torch.tensor(7)),
    "num_items_in_batch as a number": dict(labels=LABELS, num_items_in_batch=50),
    "shift_labels": dict(labels=LABELS, shift_labels=LABELS.roll(3, 1)),
    "ignore_index": dict(labels=LABELS.clamp(min=0), ignore_index=7),
    "use_cache": dict(use_cache=True),
    "use_cache=False": dict(use_cache=False),
    "logits_to_keep": dict(logits_to_keep=3),
    "logits_to_keep as positions": dict(logits_to_keep=torch.tensor([1, 4])),
    "output_hidden_states": dict(output_hidden_states=True),
    "output_hidden_states=False": dict(output_hidden_states=False),
    "output_hidden_states of one layer": dict(output_hidden_states=[1]),
    "return_dict=False": dict(return_dict=False),
    "return_dict=False with more": dict(return_dict=False, labels=LABELS, output_hidden_states=True),
    "output_attentions=False": dict(output_attentions=False),
    "output_router_logits": dict(output_router_logits=False),
    "is_causal=True": dict(is_causal=True),
    "inputs_embeds": dict(input_ids=None),
    "cache_position": dict(cache_position=torch.arange(12)),
    "unknown=None": dict(head_mask=None, token_type_ids=None),
    "cu_seq_lens_q=None": dict(
        cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, seq_idx=None
    ),
}
BOUNDARIES = torch.tensor([0, 5, 12], dtype=torch.int32)
REFUSED = {
    "output_attentions": True,
    "is_causal": False,
    "output_router_logits": True,
    "cu_seq_lens_q": BOUNDARIES,
    "cu_seq_lens_k": BOUNDARIES,
    "max_length_q": 7,
    "max_length_k": 7,
    "seq_idx": PACKED,
    "token_type_ids": IDS,
    "head_mask": torch.ones(4),
}
CACHES = {"cache", "past_key_values"}  # in tests/models/test_cache.py


def parts(output) -> dict[str, object]:
    """Every field, a cache as the number of its layers, each layer's hidden states by itself (None: not asked for)."""
    named = dict(enumerate(output)) if isinstance(output, tuple) else dict(output)
    named = {name: len(value.layers) if hasattr(value, "layers") else value for name, value in named.items()}
    layers = {
        f"{name} {i}": layer
        for name, value in named.items()
        if isinstance(value, tuple)
        for i, layer in enumerate(value)
    }
    return {name: value for name, value in named.items() if not isinstance(value, tuple)} | layers


def assert_same(actual, expected) -> None:
    assert type(actual) is type(expected)
    actual, expected = parts(actual), parts(expected)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_close(actual[name], value, CACHED)
        else:
            assert actual[name] == value, name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_honoured_has_the_hosts_effect(family):
    host = tiny_teacher(family)
    student = swap(tiny_teacher(family), "linear", layers=())
    plain = host(IDS)
    for name, given in HONOURED.items():
        given = dict(input_ids=IDS) | given
        embeds = [
            dict(inputs_embeds=model.get_input_embeddings()(IDS)) if given["input_ids"] is None else {}
            for model in (host, student)
        ]
        expected = host(**given | embeds[0])
        assert_same(student(**given | embeds[1]), expected)
        neutral = (
            "nothing",
            "use_cache",
            "output_router_logits",
            "is_causal=True",
            "inputs_embeds",
            "cu_seq_lens_q=None",
            "cache_position",
            "unknown=None",
        )
        if name not in neutral and "=False" not in name:
            assert list(parts(expected)) != list(parts(plain)) or not torch.equal(expected.logits, plain.logits), (
                f"{name} does nothing"
            )


@pytest.mark.parametrize("field, value", [("output_hidden_states", True), ("return_dict", False), ("use_cache", False)])
@torch.no_grad()
def test_what_the_configuration_asks_for(field, value):
    """Of the student as of its host, which crashes by return_dict=False in its configuration, but not as an argument;
    what a teacher's configuration asked for does not break the student of it."""
    host, student = tiny_teacher("llama"), swap(tiny_teacher("llama"), "linear", layers=())
    setattr(student.config, field, value)
    if field == "return_dict":
        expected = host(IDS, return_dict=False), host(IDS)
        setattr(host.config, field, value)
    else:
        setattr(host.config, field, value)
        expected = host(IDS), host(IDS, return_dict=True)
    assert_same(student(IDS), expected[0])
    assert_same(student(IDS, return_dict=True), expected[1])
    converted = swap(host, "mamba2", layers=(1,))
    assert converted(IDS, use_cache=True, return_dict=True).logits.shape == (2, 12, 99)
    assert converted.hidden_states(IDS).shape == (2, 12, 32)


@torch.no_grad()
def test_hidden_states_of_mixers():
    student = swap(tiny_teacher("llama"), "mamba2", layers=(0, 2))
    states = student(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 4 and torch.equal(states[-1], student.hidden_states(IDS))
    assert torch.equal(states[0], student.get_input_embeddings()(IDS))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    student = swap(tiny_teacher("llama"), "mamba2", layers=(1,))
    with pytest.raises(TypeError, match=f"A converted model does not take {name}: "):
        student(IDS, **{name: REFUSED[name]})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument_of_the_host_is_in_these_tables(family):
    host = tiny_teacher(family)
    arguments = set(inspect.signature(type(host).forward).parameters) | set(TransformersKwargs.__annotations__)
    tried = (
        {name for given in HONOURED.values() for name in given}
        | set(REFUSED)
        | CACHES
        | {"inputs_embeds", "self", "kwargs", "input_ids"}
    )
    assert arguments <= tried | {"args"}
    ours = set(inspect.signature(ConvertedForCausalLM.forward).parameters)
    assert arguments - ours - set(REFUSED) <= {"kwargs", "args"}


@torch.no_grad()
def test_attention_weights_asked_for_by_the_configuration():
    host = tiny_teacher("llama")
    host.set_attn_implementation("eager")
    host.config.output_attentions, host.config.is_causal = True, True  # of the teacher: means nothing to its student
    student = swap(host, "mamba2", layers=(1,))
    assert student(IDS).attentions is None
    student.config.output_attentions = True
    with pytest.raises(TypeError, match="does not take output_attentions: a mixer has no attention weights"):
        student(IDS)


@pytest.mark.parametrize(
    "asked, words", [({}, "call that, not the host"), (dict(is_causal=False), "call that, not the host")]
)
def test_the_host_inside_is_not_called_alone(asked, words):
    """It would not say where padding is."""
    with pytest.raises(TypeError, match=words):
        swap(tiny_teacher("llama"), "mamba2").host(IDS, use_cache=False, **asked)


def test_neither_or_both_inputs_are_refused():
    student = swap(tiny_teacher("llama"), "mamba2")
    for given in (dict(), dict(input_ids=IDS, inputs_embeds=student.get_input_embeddings()(IDS))):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            student(**given)


@torch.no_grad()
def test_positions_to_keep_in_each_row():
    student = swap(tiny_teacher("llama"), "mamba2")
    logits = student(IDS, use_cache=False).logits
    each = torch.tensor([[1, 4], [0, 7]])
    assert_close(
        student(IDS, logits_to_keep=each).logits, torch.stack([logits[0, each[0]], logits[1, each[1]]]), CACHED
    )
    where = IDS % 3 == 0
    assert_close(student(IDS, logits_to_keep=where).logits, logits[where], CACHED)


def test_losses_of_a_trainer_add_up():
    """Two micro-batches with the number of targets of both have the gradients of one batch; Trainer asks whether it may
    say that number."""
    student = swap(tiny_teacher("llama"), "gate-swa", layers=(1,)).train()
    assert student.accepts_loss_kwargs
    targets = (LABELS[:, 1:] != -100).sum()
    student(IDS, labels=LABELS).loss.backward()
    whole = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    for row in range(2):
        student(IDS[row : row + 1], labels=LABELS[row : row + 1], num_items_in_batch=targets).loss.backward()
    assert_close([p.grad for p in student.parameters() if p.grad is not None], whole, 1e-4)


class Texts(torch.utils.data.Dataset):
    """Eight, of which each has fewer targets than the one before."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = token_ids(1, 16, seed=i)[0]
        return {"input_ids": ids, "labels": torch.where(torch.arange(16) < 2 * i, -100, ids)}


def test_a_trainer_accumulates(tmp_path):
    """One step of eight texts at once, in twos, one by one."""
    found = []
    for rows in (8, 2, 1):
        student = swap(tiny_teacher("llama"), "gate-swa", layers=(1,))
        how = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        before = [p.detach().clone() for p in student.parameters()]
        Trainer(student, how, train_dataset=Texts()).train()
        found.append([p.detach() - b for p, b in zip(student.parameters(), before, strict=True)])
    assert rms(found[0][0]) > 0
    for moved in found[1:]:
        assert_close(moved, found[0], 1e-4, floor=1e-4)


def test_the_output_carries_its_cache_by_every_name():
    out = swap(tiny_teacher("llama"), "mamba2")(IDS, use_cache=True)
    assert out[CACHE_NAME] is out.past_key_values


@torch.no_grad()
def test_cache_position_is_where_the_cache_ends():
    """Loops written for transformers 4 number the tokens of each call, padding counted; another number would be another
    place."""
    student = swap(tiny_teacher("llama"), "mamba2", layers=(1,))
    first = student(IDS[:, :7], attention_mask=LEFT[:, :7], cache_position=torch.arange(7), use_cache=True)
    further = dict(attention_mask=LEFT, past_key_values=first[CACHE_NAME])
    for wrong in (
        torch.arange(5),
        torch.arange(6, 11),
        torch.arange(7, 13),
        torch.tensor([7, 8, 9, 10, 12]),
        torch.tensor(7),
    ):
        with pytest.raises(ValueError, match="cache_position, .* must count on from there"):
            student(IDS[:, 7:], cache_position=wrong, **further)
    last = student(IDS[:, 7:], cache_position=torch.arange(7, 12), **further)
    assert_close(last.logits, student(IDS, attention_mask=LEFT).logits[:, 7:], CACHED)


WRONG_MASKS = {
    "four dimensions": torch.ones(2, 1, 12, 12, dtype=torch.bool),
    "three dimensions": torch.ones(2, 12, 12),
    "one dimension": torch.ones(12),
    "too short": torch.zeros(2, 1),
    "too long": torch.ones(2, 13),
    "more rows": torch.ones(3, 12),
    "one row for two": torch.ones(1, 12),
    "a list": [[1] * 12] * 2,
    "a dictionary": {"full_attention": torch.ones(2, 12)},
}
WRONG_VALUES = {
    "not a number": torch.full((2, 12), torch.nan),
    "added to scores": torch.zeros(2, 12).masked_fill(LEFT == 0, -torch.inf),
    "documents": 1 + (PACKED == 0).cumsum(1),
    "half": torch.full((2, 12), 0.5),
    "negative": -LEFT,
}


@pytest.mark.parametrize("layers", [None, (1,), ()])
@torch.no_grad()
def test_masks_that_mean_something_else_are_refused(layers):
    """A mixer would go by the last column, or by whatever is not zero."""
    student = swap(tiny_teacher("llama"), "mamba2", layers=layers)
    for words, masks in (("must be \\[2, 12\\], and is", WRONG_MASKS), ("must hold 1 for tokens and 0", WRONG_VALUES)):
        for mask in masks.values():
            with pytest.raises(ValueError, match=f"An attention mask .*{words}"):
                student(IDS, attention_mask=mask)
    expected = student(IDS, attention_mask=LEFT).logits
    for kind in (torch.bool, torch.int32, torch.float32, torch.uint8):
        assert torch.equal(student(IDS, attention_mask=LEFT.to(kind)).logits, expected)


@torch.no_grad()
def test_masks_of_a_call_that_goes_on():
    """Of all tokens so far; the mask of this call alone leaves kept attention without that of the keys before."""
    for layers in (None, (1,)):
        student = swap(tiny_teacher("llama"), "mamba2", layers=layers)
        expected = student(IDS, attention_mask=LEFT).logits[:, 7:]

        def go_on(mask, student=student):
            cache = student(IDS[:, :7], attention_mask=LEFT[:, :7], use_cache=True)[CACHE_NAME]
            return student(IDS[:, 7:], attention_mask=mask, past_key_values=cache).logits

        assert_close(go_on(LEFT), expected, CACHED)
        for mask in (LEFT[:, 1:], LEFT[:, :6], torch.ones(2, 13)):
            with pytest.raises(ValueError, match="with 5 tokens after 7 it must be "):
                go_on(mask)
        if layers is None:
            assert_close(go_on(LEFT[:, 7:]), expected, CACHED)
        else:
            with pytest.raises(ValueError, match=r"it must be \[2, 12\], and is \[2, 5\]"):
                go_on(LEFT[:, 7:])


def characters() -> PreTrainedTokenizerFast:
    """Token n is the character n + 29, but for those that pad, begin and end, and the last, which is the prompt's last
    one twice."""
    vocabulary = {"<pad>": 0, "<begin>": 1, "<end>": 2} | {chr(i + 29): i for i in range(3, 98)} | {"RR": 98}
    inner = Tokenizer(models.BPE(vocabulary, [("R", "R")], unk_token="<pad>"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", padding_side="left"
    )


class Words(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value)

    def end(self):
        assert len(self.heard) == 7


class Never(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([11, 12, 13]), -torch.inf)


ALL = dict(return_dict_in_generate=True)
SAMPLED = dict(do_sample=True, temperature=0.7)
SEARCHES = {
    "greedy": {},
    "attention_mask": dict(attention_mask=LEFT),
    "stop_strings": dict(stop_strings=["W", "}"], tokenizer=characters()),
    "tokenizer alone": dict(tokenizer=characters()),
    "token_healing": dict(token_healing=True, tokenizer=characters()),
    "sample": SAMPLED,
    "num_return_sequences": SAMPLED | dict(num_return_sequences=3),
    "num_beams": dict(num_beams=3),
    "beams sampled": SAMPLED | dict(num_beams=2),
    "beams returned": dict(num_beams=3, num_return_sequences=2, length_penalty=0.5, early_stopping=True),
    "beams stopped": dict(num_beams=2, stop_strings=["K"], tokenizer=characters()),
    "repetition_penalty": dict(repetition_penalty=1.5),
    "encoder_repetition_penalty": dict(encoder_repetition_penalty=1.5),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "min_p": SAMPLED | dict(min_p=0.1),
    "top_k": SAMPLED | dict(top_k=3),
    "top_p": SAMPLED | dict(top_p=0.5),
    "typical_p": SAMPLED | dict(typical_p=0.5),
    "epsilon_cutoff": SAMPLED | dict(epsilon_cutoff=0.01),
    "eta_cutoff": SAMPLED | dict(eta_cutoff=0.01),
    "bad_words_ids": dict(bad_words_ids=[[5], [7]]),
    "suppress_tokens": dict(suppress_tokens=[5, 7]),
    "sequence_bias": dict(sequence_bias=[[[5], 10.0]]),
    "forced_eos_token_id": dict(forced_eos_token_id=2),
    "min_new_tokens": dict(min_new_tokens=4),
    "min_length": dict(min_length=14, eos_token_id=[5, 7]),
    "eos_token_id": dict(eos_token_id=list(range(3, 50))),
    "max_time": dict(max_time=100.0),
    "renormalize_logits": SAMPLED | dict(renormalize_logits=True),
    "remove_invalid_values": dict(remove_invalid_values=True),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(2, 1.5), eos_token_id=5),
    "guidance_scale": dict(guidance_scale=1.5),
    "negative_prompt_ids": dict(guidance_scale=1.5, negative_prompt_ids=IDS.flip(1)),
    "return_dict_in_generate": ALL,
    "output_scores": ALL | dict(output_scores=True),
    "output_logits": ALL | dict(output_logits=True),
    "output_hidden_states": ALL | dict(output_hidden_states=True),
    "scores of beams": ALL | dict(num_beams=2, output_scores=True),
    "logits_processor": dict(logits_processor=LogitsProcessorList([Never()])),
    "prefix_allowed_tokens_fn": dict(prefix_allowed_tokens_fn=lambda *_: [5, 6]),
    "stopping_criteria": dict(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(14)])),
    "use_cache": dict(use_cache=False),
    "assistant_model=None": dict(assistant_model=None, assistant_tokenizer=None),
    "head_mask=None": dict(head_mask=None),
    "synced_gpus": dict(synced_gpus=False),
    "cache_implementation": dict(cache_implementation="dynamic"),
    "prefill_chunk_size": dict(prefill_chunk_size=5),
    "generation_config": dict(generation_config=GenerationConfig(max_new_tokens=6, pad_token_id=0, num_beams=2)),
    "watermarking_config": dict(watermarking_config=WatermarkingConfig()),
    "disable_compile": dict(disable_compile=True),
    "top_h": SAMPLED | dict(top_h=0.5),
    "logits_to_keep": dict(logits_to_keep=1),
    "an unknown name": dict(no_such_argument=1),
    "labels": dict(labels=IDS),
    "cache_config": dict(cache_config={}),
}


@torch.no_grad()
def generated(model, given: dict):
    """What came out, or the kind of refusal."""
    torch.manual_seed(3)
    how = {} if "generation_config" in given else dict(max_new_tokens=6, pad_token_id=0)
    try:
        out = model.generate(IDS, **how, **given)
    except (TypeError, ValueError) as error:
        return type(error)
    return out if isinstance(out, torch.Tensor) else (type(out), out.sequences, parts(out))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SEARCHES)
def test_generation_as_the_host(name):
    """The same tokens from a student that keeps all attention; from one with mixers the same kind of result."""
    host, given = tiny_teacher("llama"), SEARCHES[name]
    expected = generated(host, given)
    kept, mixed = (generated(swap(tiny_teacher("llama"), "mamba2", layers=layers), given) for layers in ((), (1,)))
    if isinstance(expected, torch.Tensor):
        assert torch.equal(kept, expected) and type(mixed) is type(expected)
        assert mixed.shape[0] == expected.shape[0] and mixed.shape[1] > IDS.shape[1]
    elif isinstance(expected, tuple):
        assert kept[0] is mixed[0] is expected[0] and torch.equal(kept[1], expected[1])
        assert list(kept[2]) == list(expected[2]) and {n for n in mixed[2] if " " not in n} == {
            n for n in expected[2] if " " not in n
        }
    else:
        assert kept is mixed is expected and name == "an unknown name"


def test_a_streamer_hears_every_token():
    for layers in ((), None):
        student = swap(tiny_teacher("llama"), "mamba2", layers=layers)
        heard = Words()
        out = student.generate(IDS[:1], max_new_tokens=6, streamer=heard, do_sample=False)
        assert torch.equal(torch.cat([t.flatten() for t in heard.heard]), out[0])


@pytest.mark.parametrize("given, words", [
    (dict(prompt_lookup_num_tokens=3), "assisted generation|cannot be cropped"),
    (dict(return_dict_in_generate=True, output_attentions=True), "does not take output_attentions"),
])  # fmt: skip
def test_searches_that_are_refused(given, words):
    student = swap(tiny_teacher("llama"), "mamba2", layers=(1,))
    with pytest.raises((TypeError, ValueError), match=words):
        student.generate(IDS[:1], max_new_tokens=4, pad_token_id=0, **given)
