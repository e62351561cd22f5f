"""Latent attention against attention with the keys and values it stands for, and against the teacher it starts from."""

import copy
from dataclasses import replace

import pytest
import torch

from convert.core.errors import UserError
from convert.data.batches import Batch
from convert.mixers import MLA
from convert.mixers.init.latent_ranks import choose_ranks
from convert.mixers.init.mla import MLAStart
from convert.mixers.parts import rotate
from convert.mixers.projections import CalibrationStats, Projections
from convert.models.swap import swap
from convert.steps.calibration import inputs_of
from tests.conftest import FAMILIES, assert_close, perturb, rms, tiny_teacher, token_ids
from tests.mixers.small_layers import SHAPES, attention, context, in_pieces, inputs

EXACT = 1e-5
PLAIN = ("mha",)  # no norms and no biases: what the native shape can hold
LENGTH = 40


def batches(length: int = 100, count: int = 4) -> list[Batch]:
    ids = [token_ids(2, length, seed=i) for i in range(count)]
    return [Batch(i, i, torch.arange(length).expand(2, -1)) for i in ids]


def mla(shape, /, **options) -> MLA:
    return perturb(MLAStart.from_projections(attention(shape), MLA.Options(**options)))


def plain(m: MLA, x, c) -> torch.Tensor:
    """The definition: keys and values of every head of every token, and a T x T mask."""
    s, rope = m.shape, m.rope_dim
    rotary = torch.cat([m.frequencies, m.frequencies])
    latent = m.latent_norm(m.latent(x))
    queries = m.q(m.q_latent_norm(m.q_down(x)) if m.options.q_rank is not None else x).unflatten(-1, (s.num_heads, -1))
    keys = m.k_rope(x).unflatten(-1, (m.rope_heads, rope)).repeat_interleave(s.num_kv_heads // m.rope_heads, 2)
    if m.k_up is not None:
        keys = torch.cat([keys, m.k_up(latent).unflatten(-1, (s.num_kv_heads, -1))], -1)
    if m.q_norm is not None:
        queries, keys = m.q_norm(queries), m.k_norm(keys)
    queries, keys = (
        torch.cat([rotate(t[..., :rope], c.cos[..., rotary], c.sin[..., rotary]), t[..., rope:]], -1)
        for t in (queries, keys)
    )
    values = m.v_up(latent).unflatten(-1, (s.num_kv_heads, -1))
    keys, values = (t.repeat_interleave(s.num_heads // s.num_kv_heads, 2) for t in (keys, values))
    scores = torch.einsum("bthk,bshk->bhts", queries, keys) / keys.shape[-1] ** 0.5
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return m.out(torch.einsum("bhts,bshk->bthk", scores.masked_fill(hidden, -torch.inf).softmax(-1), values).flatten(2))


OPTIONS = {
    "full": {},
    "half of the rotary pairs": dict(rope_dim=4),
    "low rank": dict(rope_dim=2, kv_rank=5),
    "one latent": dict(kv_rank=1),
    "low-rank queries": dict(rope_dim=2, kv_rank=9, q_rank=7),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["expanded", "absorbed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_is_attention_with_what_it_stands_for(shape, how, options, monkeypatch):
    m, x, c = mla(shape, **options), inputs(shape, LENGTH), context(shape, torch.arange(LENGTH))
    monkeypatch.setattr(m, "_is_absorbed_cheaper", lambda *_: how == "absorbed")
    expected = plain(m, x, c)
    assert_close(m(x, c)[0], expected, 2e-6)
    assert_close(in_pieces(m, x, c, (17, 1, 20, 1, 1))[0], expected, 2e-6)


@pytest.mark.parametrize("how", ["expanded", "absorbed"])
@pytest.mark.parametrize("options", [{}, dict(rope_dim=4, kv_rank=9), dict(rope_dim=2, q_rank=7)], ids=str)
@torch.no_grad()
def test_native_shape_is_attention_with_what_it_stands_for(how, options, monkeypatch):
    shape = SHAPES["mha"]
    m, x, c = mla(shape, shape="native", **options), inputs(shape, LENGTH), context(shape, torch.arange(LENGTH))
    monkeypatch.setattr(m, "_is_absorbed_cheaper", lambda *_: how == "absorbed")
    assert_close(m(x, c)[0], plain(m, x, c), 2e-6)


def test_few_queries_are_absorbed_and_many_expanded():
    for rank in (1, 4, 8):  # a small latent would make even a long text cheaper to absorb, by multiplications
        m = mla(SHAPES["gqa-norms"], rope_dim=2, kv_rank=rank)
        assert (
            m._is_absorbed_cheaper(1, 1000)
            and not m._is_absorbed_cheaper(1000, 1000)
            and not m._is_absorbed_cheaper(64, 64)
        )


@torch.no_grad()
def test_a_start_by_the_weights_alone_looks_at_nothing_else():
    teacher = tiny_teacher("llama")
    seen, ids = inputs_of(teacher, batches()), token_ids()
    students = [
        swap(copy.deepcopy(teacher), "mla", MLA.Options(cache_budget=0.5), None, inputs) for inputs in (None, seen)
    ]
    assert torch.equal(*(student(ids, use_cache=False).logits for student in students))
    assert not MLAStart.needs_stats(MLA.Options()) and MLAStart.needs_stats(MLA.Options(start="calibrated"))


@pytest.mark.parametrize("how", ["expanded", "absorbed"])
def test_gradients_of_both_forms_are_those_of_the_definition(how, monkeypatch):
    shape = SHAPES["gqa-norms"]
    m, x, c = (
        mla(shape, rope_dim=2, kv_rank=9).double(),
        inputs(shape, LENGTH).double(),
        context(shape, torch.arange(LENGTH)),
    )
    monkeypatch.setattr(m, "_is_absorbed_cheaper", lambda *_: how == "absorbed")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    weights = torch.randn(x.shape, dtype=x.dtype)
    found, expected = (
        torch.autograd.grad((y * weights).sum(), list(m.parameters())) for y in (m(x, c)[0], plain(m, x, c))
    )
    assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("start", ["svd", "calibrated"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starts_as_its_teacher_at_full_rank(family, start):
    """Fewer latents than there are inputs or as many, q/k norm and biases included."""
    teacher, ids = tiny_teacher(family), token_ids(2, 300)
    expected = teacher(ids, use_cache=False).logits
    student = swap(
        teacher, "mla", MLA.Options(start=start), None, inputs_of(teacher, batches()) if start == "calibrated" else None
    )
    assert_close(student(ids, use_cache=False).logits, expected, EXACT)


@torch.no_grad()
def test_a_norm_is_of_the_whole_key():
    """Where only the values lose something, the scores of a teacher with q/k norm stay as they are; where rotary pairs
    go too, keys are still normed over rotated and unrotated dimensions together."""
    teacher = tiny_teacher("qwen3")
    p = Projections.of(teacher.model.layers[0].self_attn)
    m = MLAStart.from_projections(p, MLA.Options(rope_dim=4, kv_rank=24))
    x, c = torch.randn(2, 9, 32), context(p.shape, torch.arange(9))
    _, (latent, rope, real, scale) = m(x, c)
    raw = torch.einsum("gkd,btd->btgk", p.k, x)
    order = torch.cat([m.frequencies, m.frequencies + p.shape.rotary_dim // 2])
    rest = m.k_up(latent).unflatten(-1, (2, -1))
    assembled = torch.cat([raw[..., order], rest], -1)
    expected = torch.nn.functional.rms_norm(assembled, (12,), eps=p.shape.norm_eps)[..., :4] * m.k_norm.weight[:4]
    assert_close(rope, rotate(expected, c.cos[..., order], c.sin[..., order]), 1e-5)
    assert_close(scale, torch.rsqrt(assembled.square().mean(-1) + p.shape.norm_eps), 1e-5)


@torch.no_grad()
def test_a_larger_latent_is_a_smaller_error():
    teacher, ids = tiny_teacher("llama"), token_ids(2, 100, seed=9)
    expected, seen = teacher(ids, use_cache=False).logits, inputs_of(teacher, batches())
    for start in ("svd", "calibrated"):
        errors = []
        for rank in (2, 8, 16, 20, 24):
            student = swap(
                copy.deepcopy(teacher), "mla", MLA.Options(kv_rank=rank, rope_dim=4, start=start), None, seen
            )
            errors.append((student(ids, use_cache=False).logits - expected).square().mean().item())
        assert sorted(errors, reverse=True) == errors
        assert errors[0] > 2 * errors[-1]


@torch.no_grad()
def test_a_calibrated_start_beats_one_by_the_weights_alone():
    teacher, ids = tiny_teacher("llama"), token_ids(2, 100, seed=9)
    with torch.no_grad():  # inputs whose dimensions differ much, as those of real models do
        for layer in teacher.model.layers:
            layer.input_layernorm.weight.mul_(torch.logspace(-1, 1, 32))
    expected, seen = teacher(ids, use_cache=False).logits, inputs_of(teacher, batches())
    errors = {}
    for start in ("svd", "calibrated"):
        student = swap(copy.deepcopy(teacher), "mla", MLA.Options(cache_budget=0.5, start=start), None, seen)
        errors[start] = (student(ids, use_cache=False).logits - expected).square().mean().item()
    assert errors["calibrated"] < errors["svd"]


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3"])
@torch.no_grad()
def test_a_budget_is_kept_and_used(family, budget):
    teacher = tiny_teacher(family)
    student = swap(
        teacher, "mla", MLA.Options(cache_budget=budget, start="calibrated"), None, inputs_of(teacher, batches())
    )
    shape = student.slots()[0].mixer.shape
    whole = len(student.slots()) * 2 * shape.num_kv_heads * shape.head_dim
    used = sum(
        slot.mixer.options.kv_rank + shape.num_kv_heads * slot.mixer.options.rope_dim
        for slot in student.slots().values()
    )
    # its inputs, and the quarter of its keys that is rotated
    lossless = 3 * (32 + 8) if family == "gpt_neox" else whole
    assert 0.85 * min(budget * whole, lossless) <= used <= budget * whole


def test_one_rank_for_all_layers_in_the_native_shape():
    teacher = tiny_teacher("llama")
    student = swap(
        teacher,
        "mla",
        MLA.Options(cache_budget=0.5, shape="native", start="calibrated"),
        None,
        inputs_of(teacher, batches()),
    )
    assert len({(s.mixer.options.kv_rank, s.mixer.options.rope_dim) for s in student.slots().values()}) == 1


@torch.no_grad()
def test_the_shared_rotary_key_is_exact_where_the_heads_agree():
    """With equal keys in all heads, the native shape loses nothing but the latents' norm."""
    p = attention(SHAPES["mha"])
    p = replace(p, k=p.k[:1].expand(3, -1, -1).clone())
    m = MLAStart.from_projections(p, MLA.Options(shape="native"))
    x, c = inputs(SHAPES["mha"], LENGTH), context(SHAPES["mha"], torch.arange(LENGTH))
    m.latent_norm.forward = lambda t: t
    exact = MLAStart.from_projections(p, MLA.Options())
    assert_close(m(x, c)[0], exact(x, c)[0], EXACT)


@torch.no_grad()
def test_a_calibrated_native_start_steadies_the_norm():
    """Inputs of which some direction is nearly constant, as real models have: the norm of the latents then does nearly
    nothing."""
    shape, g = SHAPES["mha"], torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, shape.width, generator=g) * torch.logspace(0, -2, shape.width)
    x[..., -1] = 1 + 0.01 * x[..., -1]
    x[:, ::7] *= 1 + torch.rand(2, 58, 1, generator=g) * (torch.arange(shape.width) < 12)  # and lengths that differ
    moment = torch.einsum("btd,bte->de", x, x) / 800
    p = replace(attention(shape), stats=CalibrationStats(x.mean((0, 1)), moment, moment, torch.zeros(4)))
    m = MLAStart.from_projections(p, MLA.Options(shape="native", kv_rank=20, q_rank=20, start="calibrated"))
    for norm, latent in ((m.latent_norm, m.latent(x)), (m.q_latent_norm, m.q_down(x))):
        assert rms((norm(latent) - latent)[..., :-1]) < 0.03 * rms(latent[..., :-1])
        assert rms(norm(latent)[..., -1] - 1) < 0.03
    by_weights = MLAStart.from_projections(p, MLA.Options(shape="native", kv_rank=20, start="svd"))
    latent = by_weights.latent(x)
    assert rms(by_weights.latent_norm(latent) - latent) > 0.3 * rms(latent)


@torch.no_grad()
def test_random_start_inherits_the_output_projection_alone():
    p = attention(SHAPES["gqa-norms"])
    m = MLAStart.from_projections(p, MLA.Options(start="random", kv_rank=8, rope_dim=4))
    assert torch.equal(m.out.weight, p.o.flatten(1))
    assert 0.01 < m.latent.weight.std() < 0.03


REFUSED = [
    (dict(kv_rank=1000), "kv_rank must be at most 24"),
    (dict(q_rank=1000), "q_rank must be at most 24"),
    (dict(rope_dim=3), "rope_dim must be even and at most the 8"),
    (dict(rope_dim=10), "rope_dim must be even and at most the 8"),
    (dict(rope_dim=6, shape="native"), "even divisor of the 8"),
    (dict(cache_budget=0.05), "Raise it, or set a smaller rope_dim"),
    (dict(start="calibrated"), "needs the layers' inputs"),
]


@pytest.mark.parametrize("options, words", REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_what_cannot_be_is_refused_in_a_sentence(options, words):
    with pytest.raises(UserError, match=words):
        MLAStart.from_projections(attention(SHAPES["mha"]), MLA.Options(**options))


def test_features_it_cannot_express_are_refused():
    with pytest.raises(UserError, match="has no window"):
        choose_ranks([replace(attention(SHAPES["mha"]), window=9)], MLA.Options())
    for name, words in (("gqa-norms", "q/k norm"), ("partial-rotary-biases", "biases")):
        with pytest.raises(UserError, match=f"this teacher has {words}. Take edit.shape=exact"):
            MLAStart.from_projections(attention(SHAPES[name]), MLA.Options(shape="native"))


@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_calibration_sees_what_the_layers_see(documents):
    """Against plain sums; attention stays inside documents."""
    teacher, batch = tiny_teacher("llama"), batches(20, 1)[0]
    if documents:
        batch = replace(batch, position_ids=torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1))
    teacher.config._attn_implementation = "eager"
    seen = []
    hook = teacher.model.layers[1].self_attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs["hidden_states"], out[1])), with_kwargs=True
    )
    teacher.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hook.remove()
    (x, weights), found = seen[0], inputs_of(teacher, [batch])[1]
    assert_close(found.uniform, torch.einsum("btd,bte->de", x, x) / 40, 1e-6)
    got = weights.square().sum(1)
    weight = (got.sum(1) / got.sum() + 1 / 40) / 2
    assert_close(found.moment, torch.einsum("bt,btd,bte->de", weight, x, x), 1e-5)
    assert_close(found.mean, torch.einsum("bt,btd->d", weight, x), 1e-5)
    angles = batch.position_ids[0][:, None] * 10000.0 ** (-torch.arange(4) / 4)
    between = (angles[:, None] - angles).cos()  # [query, key, frequency]
    assert_close(found.drift, torch.einsum("bqt,qtf->f", got, between) / got.sum(), 1e-5)


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("start", ["svd", "calibrated"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope_dim", [4, None])
@torch.no_grad()
def test_a_scaled_rotary_table(family, start, rope_dim):
    """YaRN makes queries and keys longer where they are rotated. What is no longer rotated keeps its length: where all
    tokens are at position 0, nothing turns, and a student of full rank is its teacher, whichever pairs it still
    rotates."""
    teacher, ids, zero = (
        tiny_teacher(family, rope_parameters=YARN),
        token_ids(2, 30),
        torch.zeros(2, 30, dtype=torch.long),
    )
    given = dict(attention_mask=torch.ones_like(ids), position_ids=zero, use_cache=False)
    expected, seen = teacher(ids, **given).logits, None
    if start == "calibrated":
        seen = inputs_of(teacher, [Batch(b.input_ids, b.labels, torch.zeros_like(b.position_ids)) for b in batches(30)])
    student = swap(teacher, "mla", MLA.Options(start=start, rope_dim=rope_dim), None, seen)
    assert_close(student(ids, **given).logits, expected, EXACT)
    assert_close(
        swap(tiny_teacher(family, rope_parameters=YARN), "linear", layers=())(ids, **given).logits, expected, EXACT
    )
