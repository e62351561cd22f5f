"""Every search of generate() does with a student what it does with its host, or is refused in words."""

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
    WatermarkingConfig,
)  # fmt: skip
from transformers.generation.streamers import BaseStreamer

from convert.models.swap import swap
from tests.conftest import tiny_teacher
from tests.models.test_student_arguments import IDS, LEFT, parts


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
