"""A converted model is what transformers expects of a causal language model: caches, masks, generate(), saving."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert.mixers import MIXERS
from convert.models.cache import StateLayer, StudentCache
from convert.models.slot import attention_of
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from tests.conftest import (
    FAMILIES,
    LAYERS,
    SOFTMAX,
    VOCAB,
    assert_close,
    options_of,
    perturb,
    rms,
    tiny_teacher,
    token_ids,
)

CACHED = 5e-6  # of the logits' scale; measured: 1.1e-6 (a wrong position costs 1e-3 and more)
EXACT = 1e-5  # of the exact start; measured: 8e-7

every_family = pytest.mark.parametrize("family", FAMILIES)
HYBRIDS = ("mamba2+gate-swa", "mla+mamba")  # mixers in turn
MIDDLE = (1,)
every_choice = pytest.mark.parametrize("layers", [None, (1,), (0, 2)], ids=["all", "middle", "outer"])


def every_student(*choices):
    """Every mixer in each choice of layers, and every hybrid in those of several layers."""
    cases = [(name, layers) for name in (*MIXERS, *HYBRIDS) for layers in choices if name in MIXERS or layers != MIDDLE]
    names = {None: "all", MIDDLE: "middle", (0, 2): "outer"}
    return pytest.mark.parametrize("mixer, layers", cases, ids=[f"{name}-{names[layers]}" for name, layers in cases])


PIECES = (20, 1, 29, 20)


@functools.cache
def student_of(family: str, mixer: str, layers: tuple[int, ...] | None, **changes) -> ConvertedForCausalLM:
    """Away from its exact start. Shared: a test that changes it builds its own. A hybrid, named "one+other", has its
    mixers in turn in these layers, by a swap for each."""
    student, names = tiny_teacher(family, **changes), mixer.split("+")
    torch.manual_seed(0)  # here, because a teacher draws only when it is made first
    chosen = tuple(range(LAYERS)) if layers is None else layers
    for i, name in enumerate(names):
        student = swap(student, name, options_of(name), chosen[i :: len(names)])
    for slot in student.slots().values():
        perturb(slot.mixer)
    return student


@torch.no_grad()
def logits_of(model, ids, **kwargs) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def decode(student, ids, sizes=PIECES, mask=None) -> tuple[torch.Tensor, StudentCache]:
    """In pieces, with nothing but the cache to say where they belong. `mask` covers all tokens so far at each call."""
    cache, logits, start = StudentCache(student.config), [], 0
    for size in sizes:
        stop = start + size
        out = student(
            ids[:, start:stop], attention_mask=None if mask is None else mask[:, :stop], past_key_values=cache
        )
        logits.append(out.logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, 1), cache


def left_padded(pad: int, length: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    """Row 0 starts with `pad` padding tokens."""
    ids = token_ids(2, length)
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return ids, mask


@every_family
@every_student(None, MIDDLE, (0, 2))
def test_cached_decoding_is_the_full_pass(family, mixer, layers):
    student, ids = student_of(family, mixer, layers), token_ids()
    logits, cache = decode(student, ids)
    assert_close(logits, logits_of(student, ids), CACHED)
    assert cache.get_seq_length() == 70 and cache.rows.tolist() == [70, 70]


@every_family
@every_student(None, MIDDLE, (0, 2))
def test_left_padding_changes_nothing(family, mixer, layers):
    """In one pass and in pieces, beside a row without padding."""
    student, (ids, mask) = student_of(family, mixer, layers), left_padded(15)
    alone, other = logits_of(student, ids[:1, 15:]), logits_of(student, ids[1:])
    for logits in (logits_of(student, ids, attention_mask=mask), decode(student, ids, mask=mask)[0]):
        assert_close(logits[:1, 15:], alone, CACHED)
        assert_close(logits[1:], other, CACHED)


@every_family
@pytest.mark.parametrize("layers", [None, (1,)], ids=["all", "middle"])
def test_padding_longer_than_the_first_piece(family, layers):
    """A row of which nothing was seen yet starts at position 0."""
    student, (ids, mask) = student_of(family, "mamba2", layers), left_padded(25)
    logits, cache = decode(student, ids, mask=mask)
    assert_close(logits[:1, 25:], logits_of(student, ids[:1, 25:]), CACHED)
    assert cache.rows.tolist() == [45, 70]


@every_family
@every_student(None, MIDDLE, (0, 2))
def test_packed_documents_are_separate_runs(family, mixer, layers):
    student, ids = student_of(family, mixer, layers), token_ids()
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    packed = logits_of(student, ids, position_ids=positions)
    separate = torch.cat([logits_of(student, ids[:, :30]), logits_of(student, ids[:, 30:])], 1)
    assert_close(packed, separate, CACHED)
    assert rms(logits_of(student, ids) - separate) > 100 * CACHED * rms(separate)


@every_family
def test_without_a_swap_it_is_the_teacher(family):
    ids, teacher = token_ids(), tiny_teacher(family)
    expected = logits_of(teacher, ids)
    student = swap(teacher, "linear", layers=())
    assert torch.equal(logits_of(student, ids), expected)
    assert_close(decode(student, ids)[0], expected, CACHED)


@every_family
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_hand_over_from_linear_attention_is_exact(family, mixer):
    student, ids = swap(tiny_teacher(family), "linear"), token_ids(1, 300)
    for slot in student.slots().values():
        perturb(slot.mixer)
    before = logits_of(student, ids)
    after = logits_of(swap(student, mixer), ids)
    assert_close(after, before, EXACT)


def test_swap_again_replaces_some_layers_only():
    student = swap(swap(tiny_teacher("llama"), "linear"), "mamba", layers=(1,))
    assert [spec["name"] for spec in student.config.mixers] == ["linear", "mamba", "linear"]
    assert [type(slot.mixer).__name__ for slot in student.slots().values()] == [
        "LinearAttention",
        "Mamba",
        "LinearAttention",
    ]


HALF = dict(use_sliding_window=True, max_window_layers=1)  # layer 0 sees everything, the others a window
WINDOWS = {  # family, changes, converted layers, keys that the kept layers hold after 70 tokens
    "mistral-outer-kept": ("mistral", {}, (1,), {0: 15, 2: 15}),
    "mistral-middle-kept": ("mistral", {}, (0, 2), {1: 15}),
    "qwen2-full-and-window-kept": ("qwen2", HALF, (1,), {0: 70, 2: 15}),
    "qwen2-windows-kept": ("qwen2", HALF, (0,), {1: 15, 2: 15}),
    "qwen3-full-kept": ("qwen3", HALF, (1, 2), {0: 70}),
}


@pytest.mark.parametrize("family, changes, layers, kept", WINDOWS.values(), ids=WINDOWS)
def test_kept_attention_with_a_sliding_window(family, changes, layers, kept):
    """Texts of 70 tokens, a window of 16; in pieces longer and shorter than it, with and without padding."""
    student, (ids, mask) = student_of(family, "mamba2", layers, **(changes | dict(sliding_window=16))), left_padded(20)
    expected = logits_of(student, ids[1:])
    logits, cache = decode(student, ids[1:])
    assert_close(logits, expected, CACHED)
    padded, _ = decode(student, ids, mask=mask, sizes=(30, 1, 1, 38))
    assert_close(padded[1:], expected, CACHED)
    assert_close(padded[:1, 20:], logits_of(student, ids[:1, 20:]), CACHED)
    assert {i: layer.keys.shape[2] for i, layer in enumerate(cache.layers) if not isinstance(layer, StateLayer)} == kept
    unlimited = student_of(family, "mamba2", layers, **(changes | dict(sliding_window=512)))
    assert 15 not in kept.values() or rms(logits_of(unlimited, ids[1:]) - expected) > 100 * CACHED * rms(expected)


@every_family
@every_student(None, MIDDLE, (0, 2))
def test_saved_and_loaded_it_gives_the_same_logits(family, mixer, layers, tmp_path):
    """Bit for bit, by our class and by the auto class."""
    student, ids = student_of(family, mixer, layers), token_ids()
    student.save_pretrained(tmp_path)
    for loader in (ConvertedForCausalLM, AutoModelForCausalLM):
        loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values()), report
        assert isinstance(loaded, ConvertedForCausalLM) and not loaded.training
        assert torch.equal(logits_of(loaded, ids), logits_of(student, ids))


def test_options_are_saved(tmp_path):
    student = swap(tiny_teacher("llama"), "mamba", MIXERS["mamba"].Options(conv=2, dt_rank=3), layers=(1,))
    perturb(student.slots()[1].mixer)
    student.save_pretrained(tmp_path)
    loaded = ConvertedForCausalLM.from_pretrained(tmp_path)
    assert loaded.slots()[1].mixer.options == MIXERS["mamba"].Options(conv=2, dt_rank=3)
    assert torch.equal(logits_of(loaded, token_ids()), logits_of(student, token_ids()))


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embeddings_stay_tied(family, tied, tmp_path):
    """Or apart: in the student, in the file, and in what is loaded from it."""
    ids, student = token_ids(), swap(tiny_teacher(family, tie_word_embeddings=tied), "mamba2", layers=(1,))
    student.save_pretrained(tmp_path)
    loaded = ConvertedForCausalLM.from_pretrained(tmp_path)
    for model in (student, loaded, swap(loaded, "linear", layers=(0,))):
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    student.save_pretrained(tmp_path / "again")
    again = ConvertedForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, ids), logits_of(student, ids))
    count = sum(p.numel() for p in student.parameters())
    stored = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert 0 <= stored - 4 * count < 4 * VOCAB * 32, "the tied weight is stored once, the untied ones both"


@every_student(None, MIDDLE, (0, 2))
def test_cache_bytes(mixer, layers):
    """Of a live cache: what the mixers' formulas say, and keys and values of what is kept, to the byte."""
    student = student_of("llama", mixer, layers)
    kept = 0 if layers is None else 3 - len(layers)
    for length in (5, 10, 70):
        live = decode(student, token_ids(2, length), sizes=(length,))[1].num_bytes()
        states = sum(slot.mixer.state_size().at(length, torch.float32) for slot in student.slots().values())
        # 2 rows; keys and values of 2 heads of 8, float32
        assert live == 2 * (states + kept * length * (2 * 2 * 8) * 4)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_loss_and_gradients_with_and_without_checkpointing(family):
    ids, results = token_ids(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = swap(tiny_teacher(family), "mamba", layers=(0, 2)).train()
        if checkpointing:
            # the name of 5.23, of 5.20
            getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        out = student(ids, labels=ids)
        out.loss.backward()
        results.append((out.loss.detach(), [p.grad for p in student.parameters() if p.grad is not None]))
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_close(out.loss, expected.detach(), CACHED)
    assert_close(results[1][0], results[0][0], CACHED)
    assert len(results[1][1]) == len(results[0][1]) > 30
    assert_close(results[1][1], results[0][1], CACHED)


@torch.no_grad()
def test_embeddings_and_kept_logits():
    student, ids = student_of("qwen2", "mamba2", (1,)), token_ids()
    expected = logits_of(student, ids)
    embeds = student.get_input_embeddings()(ids)
    assert torch.equal(student(inputs_embeds=embeds, use_cache=False).logits, expected)
    assert_close(student(ids, use_cache=False, logits_to_keep=3).logits, expected[:, -3:], CACHED)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_bfloat16_model_keeps_float32_states(mixer):
    ids, student = token_ids(), swap(tiny_teacher("qwen3").bfloat16(), mixer, layers=(0, 2))
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    logits, cache = decode(student, ids)
    assert logits.dtype == torch.bfloat16
    states = [layer.state for layer in cache.layers if isinstance(layer, StateLayer)]
    kind = MIXERS[mixer]
    assert all(type(state) is kind.State for state in states) and len(states) == 2
    assert (mixer in SOFTMAX) == bool(kind.model_dtype_fields)  # keys, values, latents have the model's dtype, sums not
    for field, t in (item for state in states for item in state._asdict().items()):
        dtypes = (torch.bfloat16,) if field in kind.model_dtype_fields else (torch.float32, torch.bool)
        assert t.dtype in dtypes, field
    assert_close(logits, logits_of(student, ids), 0.05)  # measured: 0.0025


def test_attention_of_finds_what_was_replaced():
    student = student_of("gpt_neox", "linear", (1,))
    assert list(student.slots()) == [1]
    assert type(attention_of(student.blocks[0])).__name__ == "GPTNeoXAttention"
