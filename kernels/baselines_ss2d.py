"""The scans over images: the selective one beside VMamba's path in torch operators, that of low rank beside a full
matrix."""

import torch
from torch import Tensor

from kernels.bench_case import BenchmarkCase, Cost, Run, Size, Tensors, normal_generator
from kernels.ss2d import DIRECTIONS, ss2d, ss2d_lowrank
from kernels.ss2d.reference import transition


def ss2d_case(size: Size) -> BenchmarkCase:
    """VMamba's SS2D, by default as in its first stage on images of 224 x 224."""
    size = {"batch": 1, "D": 96, "N": 16, "H": 56, "W": 56} | size
    batch, D, N, H, W = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
        x, delta = normal(batch, H, W, D), normal(batch, DIRECTIONS, H, W, D)
        return dict(
            x=x.movedim(-1, -3),
            delta=torch.nn.functional.softplus(delta - 2).movedim(-1, -3),
            A=-torch.exp(normal(DIRECTIONS, D, N)),
            B=normal(batch, DIRECTIONS, N, H, W),
            C=normal(batch, DIRECTIONS, N, H, W),
        )

    implementations: dict[str, Run] = {
        "ours": lambda a: ss2d(**a),
        "ours, torch operators": lambda a: ss2d(**a, impl="chunked"),
        "VMamba's torch path": lambda a: vmamba_torch(**a),
    }
    places = batch * H * W
    steps = DIRECTIONS * D * N * places
    given = places * (D + DIRECTIONS * (D + 2 * N))
    return BenchmarkCase(
        size=size,
        check_size=size,
        scaling=("H", (14, 28, 56, 112)),
        cost={
            "forward": Cost(4 * (given + places * D), 5 * steps, steps),
            "backward": Cost(4 * (2 * given + places * D), 12 * steps, steps),
        },
        make_arguments=make_arguments,
        implementations=implementations,
        reference=implementations["ours, torch operators"],
    )


def ss2d_lowrank_case(size: Size) -> BenchmarkCase:
    """DLRMamba's scan, by default with half of the rank. Operations are those of the recurrence, r^2 + 2 r for
    each channel, place and direction; in chunks there are others."""
    size = {"batch": 1, "D": 96, "N": 16, "r": 8, "H": 56, "W": 56} | size
    batch, D, N, r, H, W = size.values()

    def make_arguments() -> Tensors:
        normal = normal_generator()
        U, V = (torch.linalg.qr(normal(DIRECTIONS, N, r))[0] for _ in range(2))
        return dict(
            x=normal(batch, H, W, D).movedim(-1, -3),
            U=U,
            sigma=0.95 * torch.sigmoid(normal(DIRECTIONS, r)),
            V=V,
            B=normal(batch, DIRECTIONS, N, H, W),
            C=normal(batch, DIRECTIONS, N, H, W),
        )

    def dense(a: Tensors) -> Tensor:
        one = torch.eye(N, dtype=a["x"].dtype, device=a["x"].device).expand(DIRECTIONS, -1, -1)
        full = transition(a["U"], a["sigma"], a["V"])
        return ss2d_lowrank(a["x"], full, torch.ones_like(full[:, 0]), one, a["B"], a["C"])

    implementations: dict[str, Run] = {
        "ours": lambda a: ss2d_lowrank(**a),
        "ours, torch operators": lambda a: ss2d_lowrank(**a, impl="chunked"),
        "ours, a full matrix": dense,
    }
    places = batch * H * W
    given, operations = places * (D + 2 * DIRECTIONS * N), 2 * DIRECTIONS * places * D * (r * r + 2 * r)
    return BenchmarkCase(
        size=size,
        check_size=size,
        scaling=("H", (14, 28, 56, 112)),
        cost={
            "forward": Cost(4 * (given + places * D), operations, 0),
            "backward": Cost(4 * (2 * given + places * D), 2 * operations, 0),
        },
        make_arguments=make_arguments,
        implementations=implementations,
        reference=implementations["ours, torch operators"],
    )


def vmamba_torch(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What VMamba (arXiv 2401.10166) computes where its CUDA kernels are not: four copies of the image, all decays and
    drives at once, one step after another, and the copies put together. (VMamba indexes each step, whose gradients are
    as large as all steps; here they are unbound at once, which is faster.)"""
    batch, D, H, W = x.shape

    def scanned(t: Tensor) -> Tensor:  # [batch, 4, ..., H, W] in the order of each direction
        rows, columns = t[:, ::2].flatten(-2), t[:, 1::2].mT.flatten(-2)
        forwards, backwards = (torch.stack([rows[:, i], columns[:, i]], 1) for i in (0, 1))
        return torch.cat([forwards, backwards.flip(-1)], 1)

    u, d = scanned(x[:, None].expand(-1, DIRECTIONS, -1, -1, -1)), scanned(delta)
    rows_B, rows_C = scanned(B), scanned(C)
    decay = torch.exp(torch.einsum("bkdl,kdn->bkdln", d, A))
    drive = torch.einsum("bkdl,bknl,bkdl->bkdln", d, rows_B, u)
    h, outputs = x.new_zeros(batch, DIRECTIONS, D, A.shape[2]), []
    for a, b, c in zip(decay.unbind(-2), drive.unbind(-2), rows_C.unbind(-1), strict=True):
        h = a * h + b
        outputs.append(torch.einsum("bkdn,bkn->bkd", h, c))
    y = torch.stack(outputs, -1)
    y = y[:, :2] + y[:, 2:].flip(-1)
    return y[:, 0].unflatten(-1, (H, W)) + y[:, 1].unflatten(-1, (W, H)).mT
