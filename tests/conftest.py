"""What the tests share: tiny teachers of every family, and a comparison that can fail."""

import copy
import functools
import gc
import json
import os

import pytest
import torch
from filelock import FileLock
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # read when Triton is imported

from transformers import AutoConfig, AutoModelForCausalLM

from convert.mixers import MIXERS
from kernels import trust

FAMILIES = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")
VOCAB, WIDTH, LAYERS = 99, 32, 3
# mixers whose state is keys and values of tokens, or what they are made of; the others' are sums
SOFTMAX = ("gate-swa", "mla")

# tests have caches of their own, but compile nothing twice
os.environ.setdefault("CONVERT_KERNELS", str(trust.cache_folder()))
# on tensors this small a second thread only waits, also in processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Libraries and tests stay until the end: the garbage collector need not look through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Some libraries complain where their objects outlive the interpreter."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def poison():
    """What torch.empty gives is filled with NaN, so that a read of memory nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seed():
    """What a constructor draws depends on no other test."""
    torch.manual_seed(0)


def rms(t: Tensor) -> float:
    return float(t.detach().double().square().mean().sqrt()) if t.numel() else 0.0


def assert_close(actual, expected, tolerance: float, floor: float = 0.0) -> None:
    """The RMS error is within `tolerance`, and the largest error within 20 times that, both relative to the RMS of
    `expected` or to `floor` (for gradients that cancel to nearly nothing). Takes tensors, or sequences of them."""
    if isinstance(expected, Tensor):
        actual, expected = [actual], [expected]
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"item {i}: expected shape {tuple(e.shape)}, got {tuple(a.shape)}"
        assert bool(e.isfinite().all()), f"item {i}: the expected values are not finite"
        scale, difference = max(rms(e), floor), a.detach().double() - e.detach().double()
        error, largest = rms(difference), float(difference.abs().max()) if difference.numel() else 0.0
        assert error <= tolerance * scale, (
            f"item {i}: RMS error {error:.2g} at scale {scale:.2g}, tolerance {tolerance:.2g}"
        )
        assert largest <= 20 * tolerance * scale, (
            f"item {i}: largest error {largest:.2g} at scale {scale:.2g}, tolerance {tolerance:.2g}"
        )


@functools.cache
def _teacher(family: str, changes: str):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    if family != "gpt_neox":
        sizes |= dict(num_key_value_heads=2)
    if family == "mistral":
        sizes |= dict(sliding_window=None)
    if family == "qwen3":
        sizes |= dict(head_dim=12)  # not the width over the number of heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | json.loads(changes))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms that are not 1 and biases that are not 0, so that leaving one out shows
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.mul_(2)
    return model.eval()


def tiny_teacher(family: str, **changes):
    """A fresh copy of a three-layer model of the family, with `changes` to its configuration. Its attention is far from
    uniform: the weights are 15 times a usual start's."""
    return copy.deepcopy(_teacher(family, json.dumps(changes, sort_keys=True)))


def token_ids(batch: int = 2, length: int = 70, seed: int = 0) -> Tensor:
    """[batch, length], none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def options_of(mixer: str, **changes):
    """A mixer's options for short texts and small layers: a window that 70 tokens do not fit in, a latent that leaves
    something out."""
    short = {"gate-swa": dict(window=16, sinks=3), "mla": dict(kv_rank=9, rope_dim=2)}
    return MIXERS[mixer].Options(**short.get(mixer, {}) | changes)


@torch.no_grad()
def perturb(mixer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter away from the exact start, in place: rates become positive, everything else gets noise."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in mixer.named_parameters():
        if name.endswith("rate.s"):
            parameter.copy_(0.001 + 0.02 * torch.rand(parameter.shape, generator=g))
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return mixer


def measure_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs time the machine and the model for a moment alone, draw no charts, and check what they export in this
    process: a clean one takes seconds."""
    from convert.evaluation import final_metrics, inference
    from convert.exporting import verify
    from convert.planning import machine_speed
    from convert.reports import charts

    monkeypatch.setattr(machine_speed, "SECONDS", 0.02)
    monkeypatch.setattr(machine_speed, "NAME", "machine-speed-of-tests.json")
    monkeypatch.setattr(final_metrics, "PREFILL_SECONDS", 0.2)
    monkeypatch.setattr(inference, "DECODED", 2)
    monkeypatch.setattr(verify, "check_in_clean_process", logits_here)
    monkeypatch.setattr(charts, "_svg", lambda figure, name: charts.Markup("<svg></svg>"))


@torch.no_grad()
def logits_here(folder, ids, **_):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids, use_cache=False).logits.float()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A folder of neox-nano as a linear model, after a few steps, the same one in all processes of the suite. Not to be
    changed."""
    from convert import recipes, run_recipe

    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs" / "nano-linear"
    budget = recipes.Budget(2048, 64, 256, 1e-2, 1e-3, recipes.Objective.of("forward_kl"), 256, examples=2)
    with FileLock(f"{out.parent}.lock"):
        if not (out.parent / "done").exists():
            recipe = recipes.with_setting(recipes.to_linear(budget), "distill.evaluate_every=1024")
            with pytest.MonkeyPatch.context() as patched:
                measure_briefly(patched)
                run_recipe("neox-nano", recipe, out, wandb="disabled")
            (out.parent / "done").touch()
    return out
