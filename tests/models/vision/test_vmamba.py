"""VMamba: the published checkpoints' layout and function, any size of images, and rounding."""

import pytest
import torch
from torch.nn import functional as F

from convert.core.errors import UserError
from convert.models.vision.families import StudentOptions, student_config
from convert.models.vision.start import started, starting_config
from convert.models.vision.vmamba import VMambaConfig, VMambaForImageClassification
from convert.models.vision.vmamba_published import from_published, read_published
from kernels.ss2d import ss2d
from tests.conftest import assert_close
from tests.models.vision.small_models import small_model

SIZES = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 1, 1], state_size=3, ssm_ratio=2.0, num_labels=7)


def small(**more) -> VMambaForImageClassification:
    torch.manual_seed(0)
    model = VMambaForImageClassification(VMambaConfig(**SIZES | more)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def published(dims=(16, 32, 48, 64), depths=(1, 2, 1, 1), N=3, ratio=2, classes=7) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of MzeroMiko/VMamba's vmamba_*_s2l5."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name, out, channels, kernel):
        shapes.update({f"{name}.weight": (out, channels, kernel, kernel), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def linear(name, out, width):
        shapes.update({f"{name}.weight": (out, width), f"{name}.bias": (out,)})

    conv("patch_embed.0", dims[0] // 2, 3, 3), norm("patch_embed.2", dims[0] // 2)
    conv("patch_embed.5", dims[0], dims[0] // 2, 3), norm("patch_embed.7", dims[0])
    for i, (width, depth) in enumerate(zip(dims, depths, strict=True)):
        inner, rank = ratio * width, -(-width // 16)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            norm(f"{block}.norm", width), norm(f"{block}.norm2", width), norm(f"{block}.op.out_norm", inner)
            linear(f"{block}.mlp.fc1", 4 * width, width), linear(f"{block}.mlp.fc2", width, 4 * width)
            shapes |= {f"{block}.op.in_proj.weight": (inner, width), f"{block}.op.out_proj.weight": (width, inner)}
            shapes |= {f"{block}.op.conv2d.weight": (inner, 1, 3, 3), f"{block}.op.Ds": (4 * inner,)}
            shapes |= {f"{block}.op.x_proj_weight": (4, rank + 2 * N, inner), f"{block}.op.A_logs": (4 * inner, N)}
            shapes |= {f"{block}.op.dt_projs_weight": (4, inner, rank), f"{block}.op.dt_projs_bias": (4, inner)}
        if i + 1 < len(dims):
            conv(f"layers.{i}.downsample.1", dims[i + 1], width, 3), norm(f"layers.{i}.downsample.3", dims[i + 1])
    norm("classifier.norm", dims[-1]), linear("classifier.head", classes, dims[-1])
    g = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


def published_logits(w: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """What those weights compute there: vmamba.py's VSSM with forward_type v05_noz, channels first."""

    def norm(name, x):
        x = x.movedim(1, -1)
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"]).movedim(-1, 1)

    def linear(name, x):  # a 1 x 1 convolution
        return F.conv2d(x, w[f"{name}.weight"][:, :, None, None], w.get(f"{name}.bias"))

    def down(conv, after, x):
        return norm(after, F.conv2d(x, w[f"{conv}.weight"], w[f"{conv}.bias"], stride=2, padding=1))

    x = F.gelu(down("patch_embed.0", "patch_embed.2", images))
    x = down("patch_embed.5", "patch_embed.7", x)
    for i in range(4):
        for j in range(2 if i == 1 else 1):
            b, op = f"layers.{i}.blocks.{j}", f"layers.{i}.blocks.{j}.op"
            y = linear(f"{op}.in_proj", norm(f"{b}.norm", x))
            y = F.silu(F.conv2d(y, w[f"{op}.conv2d.weight"], padding=1, groups=y.shape[1]))
            rank, inner = w[f"{op}.dt_projs_weight"].shape[2], y.shape[1]
            r, B, C = torch.einsum("bdhw,kcd->bkchw", y, w[f"{op}.x_proj_weight"]).split([rank, 3, 3], 2)
            delta = torch.einsum("bkrhw,kdr->bkdhw", r, w[f"{op}.dt_projs_weight"])
            A, D = -w[f"{op}.A_logs"].exp().view(4, inner, 3), w[f"{op}.Ds"].view(4, inner)
            y = ss2d(y, delta, A, B, C, D, w[f"{op}.dt_projs_bias"], True, impl="reference")
            x = x + linear(f"{op}.out_proj", norm(f"{op}.out_norm", y))
            x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))))
        if i < 3:
            x = down(f"layers.{i}.downsample.1", f"layers.{i}.downsample.3", x)
    return F.linear(norm("classifier.norm", x).mean((2, 3)), w["classifier.head.weight"], w["classifier.head.bias"])


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 33)])
def test_a_published_checkpoint_computes_what_it_did(size):
    model, weights = small(), published()
    model.load_state_dict(from_published(weights, model), strict=True)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found, wanted = model(images).logits, published_logits(weights, images)
    assert_close(found, wanted, 1e-12)
    assert wanted.std() > 1e-3


def test_a_student_begins_with_a_published_file(tmp_path):
    teacher = small_model("vit", channels=3, classes=5, side=32).config
    options = StudentOptions(start=str(tmp_path / "vssm1_tiny.pth"))
    weights = {k: v.float() for k, v in published((96, 192, 384, 768), (2, 2, 8, 2), 1, 1, 1000).items()}
    torch.save({"model": weights}, tmp_path / "vssm1_tiny.pth")
    config = starting_config("vmamba-tiny", options, teacher)
    student = started("vmamba-tiny", options, config, VMambaForImageClassification(config))
    assert config.num_labels == 5 and student.classifier.weight.shape == (5, 768)
    assert torch.equal(student.stages[2].blocks[7].mixer.in_proj.weight, weights["layers.2.blocks.7.op.in_proj.weight"])
    torch.save({"model": weights | {"layers.2.blocks.8.norm.weight": torch.ones(384)}}, tmp_path / "vssm1_tiny.pth")
    with pytest.raises(
        UserError, match="read whole; .*holds 1 tensors .* first layers.2.blocks.8.norm.weight|stages.2"
    ):
        started("vmamba-tiny", options, config, VMambaForImageClassification(config))
    with pytest.raises(UserError, match="must fit the student but for its head; "):
        small = student_config("vmamba", StudentOptions(), teacher)
        started("vmamba", options, small, VMambaForImageClassification(small))
    with pytest.raises(UserError, match="vit-nano is a vit, and .* a vmamba"):
        starting_config("vit-nano", options, teacher)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"hello", "of tensors and numbers alone; .* cannot be read"),
        (b"\x80\x02junk", "of tensors and numbers alone; .* cannot be read"),
        ({"model": {"weight": 3}}, "holds its weights by name"),
        ({0: torch.zeros(1)}, "holds its weights by name"),
        ({"weight": torch.zeros(1)}, "holds its weights by name"),
    ],
)
def test_a_file_that_is_no_vmamba_is_refused(content, message, tmp_path):
    file = tmp_path / "other.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=message):
        read_published(file)


def test_float32_is_close_to_float64_with_gradients():
    double, found = small(), []
    single = small().float()
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for model in (single, double):
        logits = model(images.to(model.dtype)).logits
        found.append((logits, torch.autograd.grad(logits.square().sum(), list(model.parameters()))))
    (logits, gradients), (wanted, wanted_gradients) = found
    assert_close(logits, wanted, 1e-5)
    assert_close(gradients, wanted_gradients, 1e-4, floor=1e-3)


def test_it_starts_with_the_steps_and_decays_of_mamba():
    torch.manual_seed(0)
    mixer = VMambaForImageClassification(VMambaConfig(**SIZES)).stages[1].blocks[0].mixer
    dt = F.softplus(mixer.dt_bias)
    assert 0.99e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.1001
    assert torch.allclose(mixer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand_as(mixer.A_log))
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
