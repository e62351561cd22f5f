"""What others put around a student's modules acts in full passes and in cached decoding alike: adapters, weights on
disk, packed weights.

Where the weights of latent attention may not be read, it decodes by keys and values made anew: the same logits, by way
of forward()."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from convert.core.errors import UserError
from convert.exporting import native
from convert.mixers import MIXERS, MLA
from convert.mixers.mla import _is_plain
from convert.mixers.projections import Projections
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import swap
from tests.conftest import assert_close, perturb, rms, tiny_teacher, token_ids
from tests.models.test_student import CACHED, decode, logits_of, student_of

peft = pytest.importorskip("peft")
# of peft and torch.ao about themselves
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STUDENTS = {(family, mixer): (family, mixer) for family in ("qwen3", "gpt_neox") for mixer in MIXERS}
every_student = pytest.mark.parametrize("family, mixer", STUDENTS.values(), ids=["-".join(s) for s in STUDENTS])
IDS = token_ids(2, 24)
PIECES = (9, 1, 1, 12, 1)


def own_student(family: str, mixer: str) -> ConvertedForCausalLM:
    return copy.deepcopy(student_of(family, mixer, (0, 2)))


def assert_decodes(model: nn.Module, student: ConvertedForCausalLM, tolerance: float = CACHED) -> torch.Tensor:
    """Cached decoding is the full pass of `model`, whose configuration is the student's; the full pass."""
    expected = logits_of(model, IDS)
    model.config = student.config
    assert_close(decode(model, IDS, PIECES)[0], expected, tolerance)
    return expected


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=r".*\.mixer\.(.*\.)?(q|k|v|k_up|v_up|gate|out|latent)",
        feedforward_modules=[],
        init_ia3_weights=False,
    ),
    "norms-and-gates": lambda: peft.LoraConfig(
        r=3,
        target_modules=["out"],
        modules_to_save=["q_norm", "k_norm", "latent_norm", "gate"],
        init_lora_weights=False,
    ),
}


@every_student
@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_adapters(family, mixer, adapter):
    """And merged they are weights like any others."""
    student = own_student(family, mixer)
    before = logits_of(student, IDS)
    adapted = peft.get_peft_model(student, ADAPTERS[adapter]()).eval()
    if adapter == "norms-and-gates":
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    expected = assert_decodes(adapted, student)
    assert rms(expected - before) > 100 * CACHED * rms(before)
    greedy = [
        adapted.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*greedy)
    merged = adapted.merge_and_unload()
    assert_close(logits_of(merged, IDS), expected, 10 * CACHED)
    assert_decodes(merged, student)


@pytest.mark.parametrize("mixer", MIXERS)
def test_adapters_learn_in_every_linear_layer(mixer):
    student = peft.get_peft_model(own_student("qwen3", mixer), ADAPTERS["lora"]()).train()
    student(IDS, labels=IDS).loss.backward()
    assert not [
        name for name, p in student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]


@every_student
@pytest.mark.parametrize("on_disk", [("0", "2"), ("1",), ("0", "1", "2")], ids="-".join)
@torch.no_grad()
def test_layers_on_disk(family, mixer, on_disk, tmp_path):
    student = student_of(family, mixer, (0, 2))
    student.save_pretrained(tmp_path / "student")
    body = "host.gpt_neox" if family == "gpt_neox" else "host.model"
    places = {f"{body}.{name}": "cpu" for name, _ in student.host.base_model.named_children() if name != "layers"} | {
        "host.lm_head": "cpu"
    }
    places |= {f"{body}.layers.{layer}": "disk" if layer in on_disk else "cpu" for layer in "012"}
    parted = AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", device_map=places, offload_folder=tmp_path / "off"
    )
    assert any(p.is_meta for p in parted.parameters())
    assert torch.equal(logits_of(parted, IDS), logits_of(student, IDS))
    assert_close(decode(parted, IDS, PIECES)[0], logits_of(student, IDS), CACHED)


class Int8(nn.Module):
    """A linear layer as a quantiser leaves it: rows of eight bits, and no weight in floating point."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def pack(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8(child))
        else:
            pack(child)


@every_student
@torch.no_grad()
def test_packed_weights(family, mixer):
    student = own_student(family, mixer)
    before = logits_of(student, IDS)
    pack(student)
    after = assert_decodes(student, student)
    assert 0 < rms(after - before) < 0.2 * rms(before)


@every_student
@torch.no_grad()
def test_dynamic_quantisation_of_torch(family, mixer):
    """Activations are quantised by the range of a call, so that only calls of the same tokens agree: cached ones with
    other cached ones."""
    student = own_student(family, mixer)
    packed = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, dtype=torch.qint8)
    before = logits_of(student_of(family, mixer, (0, 2)), IDS)
    for logits in (logits_of(packed, IDS), decode(packed, IDS, PIECES)[0]):
        # measured: 0.224 (kda), 0.221 (gdn), 0.178
        assert rms(logits - before) < (0.25 if mixer in ("kda", "gdn") else 0.2) * rms(before)


def test_latent_attention_reads_plain_weights_only():
    """Absorbed where it may, so that decoding stays fast; by forward() where a hook, another class or other numbers are
    in the way."""
    plain = nn.Linear(3, 3)
    assert _is_plain(plain)
    hooked, patched, cast, other = (copy.deepcopy(plain) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    cast.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    other.__class__ = type("Adapted", (nn.Linear,), {})
    nn.utils.parametrizations.orthogonal(spectral := copy.deepcopy(plain))
    assert not any(map(_is_plain, (hooked, patched, cast, other, spectral, plain.to("meta"))))


@pytest.mark.parametrize("how", ["lora", "int8"])
def test_what_is_not_in_the_weights_is_not_converted(how):
    """A conversion, or a native export, would drop it."""
    teacher, student = tiny_teacher("llama"), swap(tiny_teacher("llama"), "linear")
    latent = swap(tiny_teacher("llama"), "mla", MLA.Options(shape="native", kv_rank=11))
    for model in (teacher, student, latent):
        peft.get_peft_model(model, ADAPTERS["lora"]()) if how == "lora" else pack(model)
    for convert in (
        lambda: Projections.of(teacher.model.layers[0].self_attn),
        lambda: swap(student, "mamba"),
        lambda: native.to_native(latent),
    ):
        with pytest.raises(UserError, match=r"plain weights; this one is a (Linear|Int8)\. Merge its adapter"):
            convert()


def test_the_packed_layer_is_like_the_plain_one():
    linear, x = perturb(nn.Linear(8, 5)), torch.randn(3, 8)
    assert_close(Int8(linear)(x), linear(x), 0.02)
