"""One step of the selective scan on a GPU, in Triton: each state is read and written once."""

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # in a try: transformers then lets a machine without Triton load an export that this file travels with
    raise

from kernels.autotune import on_device_of, tuned

LOG2E = tl.constexpr(1.4426950408889634)


@tuned((1, 1), key=["heads", "P", "N"], restore=("state",))
@triton.jit
def update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y, heads, groups, P, N,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """state [batch, heads, P, N]; x, dt, z, y [batch, heads, P]; A [heads, P, N]; D, dt_bias [heads, P]; B, C [batch, groups, N].
    All contiguous; a program has BLOCK_P channels of one head."""
    row, p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    b, head, real = row // heads, row % heads, p < P
    x_P = tl.load(x + row * P + p, mask=real, other=0.0).to(tl.float32)
    dt_P = tl.load(dt + row * P + p, mask=real, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt_P += tl.load(dt_bias + head * P + p, mask=real, other=0.0).to(tl.float32)
    if SOFTPLUS:
        e_P = tl.exp(tl.minimum(dt_P, 20.0))
        series_P = e_P * (1.0 - e_P * (0.5 - e_P * (1.0 / 3.0 - e_P * 0.25)))  # of log(1 + e), where 1 + e would round e away
        dt_P = tl.where(dt_P > 20.0, dt_P, tl.where(e_P < 0.03, series_P, tl.log(1.0 + e_P)))
    y_P = tl.zeros((BLOCK_P,), tl.float32)
    group = b * groups + head // (heads // groups)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        tile, inside = p[:, None] * N + n[None, :], real[:, None] & (n < N)[None, :]
        A_PN = tl.load(A + head * P * N + tile, mask=inside, other=0.0).to(tl.float32)
        B_N = tl.load(B + group * N + n, mask=n < N, other=0.0).to(tl.float32)
        C_N = tl.load(C + group * N + n, mask=n < N, other=0.0).to(tl.float32)
        h_PN = tl.load(state + row * P * N + tile, mask=inside, other=0.0).to(tl.float32)
        h_PN = tl.exp2(dt_P[:, None] * A_PN * LOG2E) * h_PN + (dt_P * x_P)[:, None] * B_N[None, :]
        tl.store(state + row * P * N + tile, h_PN, mask=inside)
        y_P += tl.sum(h_PN * C_N[None, :], 1)
    if HAS_D:
        y_P += tl.load(D + head * P + p, mask=real, other=0.0).to(tl.float32) * x_P
    if HAS_Z:
        z_P = tl.load(z + row * P + p, mask=real, other=0.0).to(tl.float32)
        y_P *= z_P * tl.sigmoid(z_P)
    tl.store(y + row * P + p, y_P, mask=real)


def update_triton(state, x, dt, A, B, C, D, z, dt_bias, softplus: bool) -> Tensor:
    """As update_reference."""
    batch, heads, P, N = state.shape
    x, dt, A, B, C, D, z, dt_bias = (t if t is None else t.contiguous() for t in (x, dt, A, B, C, D, z, dt_bias))
    y = x.new_empty(batch, heads, P, dtype=state.dtype)
    block_n = min(64, triton.next_power_of_2(N))
    block_p = max(1, min(triton.next_power_of_2(P), 1024 // block_n))
    with on_device_of(state):
        update_kernel[(batch * heads, triton.cdiv(P, block_p))](
            state, x, dt, A, B, C, *(x if t is None else t for t in (D, z, dt_bias)), y, heads, B.shape[1], P, N, HAS_D=D is not None,
            HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus, BLOCK_P=block_p, BLOCK_N=block_n,
        )  # fmt: skip
    return y
