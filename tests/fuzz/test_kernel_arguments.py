"""Kernels with arguments of random shapes, types and flags: ValueError, or what the reference says."""

import torch
from hypothesis import strategies as st

from kernels.chunk_scan import chunk_scan
from kernels.selective_scan import selective_scan
from tests.conftest import assert_close
from tests.fuzz import fuzz

SIZE = st.integers(0, 5)
DTYPE = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
)
LAYOUT = st.sampled_from(["plain", "transposed", "expanded", "meta", "none", "list"])
FAULTS = ("shape", "dtype", "layout", "nothing", "nothing", "nothing")


@st.composite
def call(draw, names_and_shapes):
    """Sizes, arguments of a kernel by name, and how many of them are not what they should be."""
    sizes = {letter: draw(st.integers(1, 5)) for letter in "bhpngr"} | {"l": draw(st.sampled_from([1, 2, 3, 17, 65]))}
    sizes["h"] *= sizes["g"]
    seed = draw(st.integers(0, 1000))
    generator, arguments, wrong = torch.Generator().manual_seed(seed), {}, draw(st.integers(0, 2))
    shapes = names_and_shapes(sizes, draw)
    faulty = draw(st.lists(st.sampled_from(sorted(shapes)), max_size=wrong, unique=True))
    for name, shape in shapes.items():
        fault = draw(st.sampled_from(FAULTS)) if name in faulty else "nothing"
        arguments[name] = _tensor(draw, name, shape, fault, generator)
    return arguments


def _tensor(draw, name, shape, fault, generator):
    shape = tuple(draw(st.lists(SIZE, max_size=5))) if fault == "shape" else shape
    t = torch.rand(shape, generator=generator, dtype=torch.float64)
    t = -t if name == "A" else t + 0.1
    if name == "document_ids":
        t = (t > 0.9).long().cumsum(-1) if t.ndim else t.long()
    else:
        t = t.float()
    if fault == "dtype":
        return t.to(draw(DTYPE))
    how = draw(LAYOUT) if fault == "layout" else "plain"
    if how == "transposed" and t.ndim > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "expanded" and t.ndim and t.shape[0]:
        return t[:1].expand(t.shape)
    return {"meta": lambda: t.to("meta"), "none": lambda: None, "list": lambda: t.tolist()}.get(how, lambda: t)()


def selective(sizes, draw):
    b, d, n, g, r, length = sizes["b"], sizes["h"], sizes["n"], sizes["g"], sizes["r"], sizes["l"]
    shapes = {
        "u": (b, d, length),
        "delta": (b, d, length),
        "A": (d, n),
        "B": (b, g, n, length),
        "C": (b, g * r, n, length),
    }
    extra = {
        "D": (r * d,),
        "z": (b, r * d, length),
        "delta_bias": (d,),
        "document_ids": (b, length),
        "initial_state": (b, d, n),
    }
    return shapes | {
        name: extra[name] for name in draw(st.lists(st.sampled_from(sorted(extra)), max_size=3, unique=True))
    }


def chunk(sizes, draw):
    b, h, p, n, g, length = sizes["b"], sizes["h"], sizes["p"], sizes["n"], sizes["g"], sizes["l"]
    queries_per_state = draw(st.sampled_from([g, h * sizes["r"]]))
    shapes = {
        "x": (b, length, h, p),
        "dt": (b, length, h),
        "A": (h,),
        "B": (b, length, g, n),
        "C": (b, length, queries_per_state, n),
    }
    extra = {"D": (max(h, queries_per_state),), "document_ids": (b, length), "initial_states": (b, h, n, p)}
    return shapes | {
        name: extra[name] for name in draw(st.lists(st.sampled_from(sorted(extra)), max_size=2, unique=True))
    }


def agrees(kernel, arguments, flags):
    found = {}
    for impl in ("reference", "chunked", "auto"):
        try:
            found[impl] = kernel(**arguments, **flags, impl=impl)
        except ValueError as error:
            found[impl] = str(error).replace(impl, "")
    refused = {impl for impl, value in found.items() if isinstance(value, str)}
    assert len(refused) in (0, 3), found
    if not refused:
        for impl in ("chunked", "auto"):
            if found["reference"].is_meta:
                assert found[impl].shape == found["reference"].shape
            else:
                assert_close(
                    found[impl],
                    found["reference"],
                    2e-2 if found[impl].dtype in (torch.bfloat16, torch.float16) else 1e-4,
                    floor=1e-3,
                )


@fuzz(100, arguments=call(selective), normalize=st.booleans(), softplus=st.booleans())
def test_selective_scan(arguments, normalize, softplus):
    agrees(selective_scan, arguments, {"normalize": normalize, "delta_softplus": softplus})


@fuzz(100, arguments=call(chunk), normalize=st.booleans())
def test_chunk_scan(arguments, normalize):
    agrees(chunk_scan, arguments, {"normalize": normalize})
