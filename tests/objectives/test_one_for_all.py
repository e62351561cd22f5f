"""The One-for-All loss against a formula by hand, and its projectors against the paper's own stages."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.objectives import Objective
from convert.objectives.divergences import cross_entropy, forward_kl
from convert.objectives.one_for_all import OneForAll, enhanced_cross_entropy, target_of
from convert.objectives.stage_projectors import Block, MapProjector, PatchMerging, TokenProjector, initialise
from convert.objectives.stages import Features, StagedModel, StageShape
from tests.objectives.test_divergences import logits

ZEROS = torch.zeros(4, 5, dtype=torch.float64)


def by_hand(student, teacher, labels, gamma, temperature=1.0):
    """The loss [B], class by class with Python's numbers; a label of None is unknown."""
    found = []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels, strict=True):
        p, q = ([math.exp(x / temperature) for x in z] for z in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        weights = [(1 + p[c]) ** gamma - 1 if c == label else p[c] ** gamma for c in range(len(p))]
        found.append(-sum(w * math.log(x) for w, x in zip(weights, q, strict=True)))
    return torch.tensor(found, dtype=torch.float64)


def one_hot(labels, classes=5):
    return torch.stack([torch.zeros(classes) if i is None else torch.eye(classes)[i] for i in labels]).double()


@pytest.mark.parametrize("gamma, temperature", [(1.0, 1.0), (1.3, 1.0), (2.0, 3.0), (0.5, 1.0)])
def test_the_loss_and_its_gradients_are_those_by_hand(gamma, temperature):
    s, t, labels = logits(4, 5).requires_grad_(), logits(4, 5, seed=1), [0, None, 3, 4]
    loss = enhanced_cross_entropy(s, t, one_hot(labels), gamma, temperature)
    torch.testing.assert_close(loss, by_hand(s.detach(), t, labels, gamma, temperature), rtol=1e-12, atol=0)
    p, target = (t / temperature).softmax(-1), one_hot(labels)
    weights = torch.where(target > 0, (1 + p) ** gamma - 1, p**gamma)
    expected = (weights.sum(-1, keepdim=True) * (s / temperature).softmax(-1) - weights) / temperature
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), s)[0], expected, rtol=1e-10, atol=1e-14)


def test_at_gamma_one_it_is_the_soft_cross_entropy():
    s, t = logits(4, 5), logits(4, 5, seed=1)
    soft = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
    for target in (ZEROS, one_hot([0, 1, 2, 3])):
        torch.testing.assert_close(enhanced_cross_entropy(s, t, target, 1.0), soft)
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft - entropy, forward_kl(s, t))


def test_a_larger_gamma_says_more_of_the_target():
    t, target = logits(4, 5), one_hot([0, 1, 2, 3])
    weights = [(t.softmax(-1) + target) ** gamma - target for gamma in (1.0, 1.5, 2.0)]
    share = [(w * target).sum(-1) / w.sum(-1) for w in weights]
    assert (share[0] < share[1]).all() and (share[1] < share[2]).all()


def test_the_target_of_mixed_labels_is_the_most_likely_class():
    targets = torch.tensor([[0.2, 0.5, 0.3], [0, 0, 0], [0.9, 0.05, 0.05]])
    assert target_of(targets).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


class Model(nn.Module):
    """What a term reads of a classifier: its configuration, where it is, and here the shapes of its stages."""

    def __init__(self, shapes, classes=5, device="cpu"):
        super().__init__()
        self.config = type("Config", (), {"num_labels": classes})
        self.parameter = nn.Parameter(torch.zeros(1, device=device))
        self.shapes = shapes


def maps(widths, sides):
    return [StageShape(True, width, side, side) for width, side in zip(widths, sides, strict=True)]


def tokens(widths, sides, special=0):
    return [StageShape(False, width, side, side, special) for width, side in zip(widths, sides, strict=True)]


SIDES = (56, 28, 14, 7)
RESNET18 = maps((64, 128, 256, 512), SIDES)
DEIT_T = tokens((192,) * 4, (14,) * 4, 1)
SMALL = maps((8, 16, 24, 32), (8, 4, 2, 2))


def output(shape, batch=2, seed=0):
    sizes = (shape.width_of_features, shape.height, shape.width)
    if not shape.is_map:
        sizes = (shape.special_tokens + shape.height * shape.width, shape.width_of_features)
    return logits(batch, *sizes, seed=seed)


def staged(model):
    return StagedModel(model, model.shapes)


def built(text, student, teacher, seed=0):
    torch.manual_seed(seed)
    return Objective.of(text).build(student, teacher, staged).double()


def test_the_papers_objective_is_the_sum_of_its_parts():
    """L = cross-entropy + the loss of the logits + the loss of each stage's projected features, all weights 1."""
    student, teacher = Model(SMALL), Model(tokens((12,) * 4, (4,) * 4, 1))
    live = built("cross_entropy + one_for_all(gamma=1.4, last_gamma=1.2)", student, teacher)
    ours = Features(tuple(output(shape, 4) for shape in SMALL), logits(4, 5))
    theirs, targets = Features((), logits(4, 5, seed=1)), one_hot([1, 0, 4, 2])
    found = live.on_logits(ours.logits, theirs.logits, targets, 1 / 4) + live.on_stages(ours, theirs, targets, 1.0)
    projected = [live.owned["one_for_all_term"][str(i)](stage) for i, stage in enumerate(ours.stages)]
    expected = cross_entropy(ours.logits, targets) + by_hand(ours.logits, theirs.logits, [1, 0, 4, 2], 1.2)
    expected += sum(by_hand(z, theirs.logits, [1, 0, 4, 2], 1.4) for z in projected)
    torch.testing.assert_close(found, expected.mean())


def test_stages_and_weights_are_chosen():
    student, teacher = Model(SMALL), Model(SMALL)
    ours, theirs = Features(tuple(map(output, SMALL)), logits(2, 5)), Features((), logits(2, 5, seed=1))
    live = built("one_for_all(stages=24, logits_weight=0)", student, teacher)
    assert list(live.owned["one_for_all_term"]) == ["1", "3"]
    used = tuple(stage.requires_grad_() for stage in ours.stages)
    live.on_stages(Features(used, ours.logits.requires_grad_()), theirs, one_hot([0, 1]), 1.0).backward()
    assert [stage.grad is not None for stage in used] == [False, True, False, True]
    assert ours.logits.grad.abs().max() == 0


@pytest.mark.parametrize("stages", [21, 11, 15, 1234])
def test_stages_that_are_not_there_are_refused(stages):
    with pytest.raises(UserError, match=r"first to last, each once; it has 3, and stages is .*\.$"):
        built(f"one_for_all(stages={stages})", Model(SMALL[:3]), Model(SMALL))


@pytest.mark.parametrize(
    "student, teacher_width, convolutions",
    [
        (RESNET18, 192, [[64, 128, 128, 256, 256, 512], [128, 256, 256, 512], [256, 512], [512]]),
        (RESNET18, 768, [[64, 128, 128, 256, 256, 768], [128, 256, 256, 768], [256, 768], [768]]),
        (maps((256, 512, 1024, 2048), SIDES), 768,
         [[256, 512, 512, 1024, 1024, 2048], [512, 1024, 1024, 2048], [1024, 2048], [2048]]),
        (maps((24, 32, 96, 1280), SIDES), 192, [[24, 48, 48, 96, 96, 1280], [32, 64, 64, 1280], [96, 1280], [1280]]),
    ],
    ids=["ResNet-18 of DeiT-T", "ResNet-18 of Swin-T", "ResNet-50 of Swin-T", "MobileNetV2 of DeiT-T"],
)  # fmt: skip
def test_projectors_of_convolutional_students(student, teacher_width, convolutions):
    teacher = Model(tokens((teacher_width,) * 4, (14,) * 4, 1), 1000, "meta")
    live = Objective.of("one_for_all").build(Model(student, 1000, "meta"), teacher, staged)
    for i, expected in enumerate(convolutions):
        projector = live.owned["one_for_all_term"][str(i)]
        points = [m for m in projector.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
        assert [m.out_channels for m in points] == expected
        depthwise = [m for m in projector.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert [m.stride[0] for m in depthwise] == [2, 1] * (3 - i) and all(m.bias is None for m in depthwise)
        last = max(student[-1].width_of_features, teacher_width)
        assert projector[-1].in_features == last and projector[-1].out_features == 1000
        before_pooling = nn.Sequential(*list(projector)[:-3])(output(student[i]).to("meta", torch.float32))
        assert before_pooling.shape == (2, last, 7, 7)
        assert projector(output(student[i]).to("meta", torch.float32)).shape == (2, 1000)


@pytest.mark.parametrize(
    "student, merges",
    [
        (DEIT_T, [[192]] * 4),
        (tokens((96, 192, 384, 768), SIDES), [[768] * 3, [768] * 2, [768], []]),
        (tokens((768,) * 4, (14,) * 4), [[768]] * 4),
        (tokens((48,) * 4, (7,) * 4, 1), [[]] * 4),
    ],
    ids=["DeiT-T", "Swin-T", "Mixer-B/16", "a grid of 7"],
)  # fmt: skip
def test_projectors_of_token_students(student, merges):
    live = Objective.of("one_for_all").build(Model(student, 1000, "meta"), Model(RESNET18, 1000, "meta"), staged)
    width = student[-1].width_of_features
    for i, expected in enumerate(merges):
        projector = live.owned["one_for_all_term"][str(i)]
        merging = [m for m in projector.merge if isinstance(m, PatchMerging)]
        assert [m.reduction.out_features for m in merging] == expected
        kinds = [type(m.activation) for m in merging]
        assert kinds == [nn.GELU] * len(kinds[:-1]) + [nn.Identity if len(kinds) > 1 else nn.GELU] * bool(kinds)
        assert len(projector.blocks) == max(3 - i, 1) and projector.head.in_features == width
        stage = output(student[i]).to("meta", torch.float32)
        assert projector.merge(stage[:, student[i].special_tokens :]).shape == (2, 49, width)
        assert projector(stage).shape == (2, 1000)


def test_patch_merging_puts_neighbours_side_by_side():
    """Column by column, as Swin does; what is outside of an odd grid is 0."""
    merging = PatchMerging(3, 3, 2, 8, nn.Identity()).double()
    merging.norm, merging.reduction = nn.Identity(), nn.Identity()
    grid = logits(1, 3, 3, 2)
    padded = F.pad(grid, (0, 0, 0, 1, 0, 1))
    expected = torch.cat([padded[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).flatten(1, 2)
    assert torch.equal(merging(grid.flatten(1, 2)), expected)


def test_class_tokens_are_read_and_seen():
    shape = StageShape(False, 8, 2, 2, 2)
    projector = TokenProjector(shape, 1, 8, 5).double().apply(initialise)
    stage = output(shape).requires_grad_()
    projector(stage).sum().backward()
    assert all(stage.grad[:, i].abs().max() > 0 for i in range(6))
    with torch.no_grad():
        assert torch.equal(projector.head(projector.blocks(stage)[:, 0]), projector(stage))
        narrow = TokenProjector(StageShape(False, 4, 2, 2, 2), 1, 8, 5).double()
        x = output(StageShape(False, 4, 2, 2, 2))
        assert torch.equal(narrow(x), narrow.head(narrow.blocks(narrow.merge(x[:, 2:])).mean(1)))


def test_a_block_is_attention_and_an_mlp():
    block, x = Block(8).double(), logits(2, 5, 8)
    attention = nn.MultiheadAttention(8, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(block.qkv.weight)
        attention.in_proj_bias.zero_()
        attention.out_proj.load_state_dict(block.project.state_dict())
        y = block.norm1(x)
        y = x + attention(y, y, y)[0]
        torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_the_start_is_the_official_codes():
    torch.manual_seed(0)
    convolutional = MapProjector(StageShape(True, 64, 8, 8), 1, 128, 10).apply(initialise)
    depthwise, point = list(convolutional[0])[:2]
    assert depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    assert point.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    assert convolutional[-1].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert convolutional[-1].bias.abs().max() == 0


def test_one_image_cannot_be_normalised():
    live = built("one_for_all", Model(SMALL), Model(SMALL))
    alone = Features(tuple(output(shape, 1) for shape in SMALL), logits(1, 5))
    with pytest.raises(UserError, match="a micro-batch must have two or more; it has one"):
        live.on_stages(alone, alone, one_hot([0]), 1.0)


def test_every_projector_learns():
    student, teacher = Model(tokens((8, 16, 16, 16), (9, 4, 4, 4), 1)), Model(SMALL)
    live = built("one_for_all(gamma=1.5)", student, teacher)
    ours = Features(tuple(map(output, student.shapes)), logits(2, 5))
    live.on_stages(ours, Features((), logits(2, 5, seed=1)), one_hot([0, None]), 1.0).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in live.parameters())


def test_terms_on_stages_need_stages():
    assert OneForAll().build(None, None) is None
    with pytest.raises(UserError, match="one_for_all compares stages of two image classifiers"):
        Objective.of("one_for_all").build(Model(SMALL), Model(SMALL))
