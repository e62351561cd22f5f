"""The devices that kernels are audited for, and what the texts of a compiled kernel say: resources, and operations."""

import contextlib
import io
import operator
import re
from dataclasses import dataclass
from math import ceil, prod

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend


@dataclass(frozen=True)
class Target:
    """Peaks in units a second. `exp`: exponentials. Products of tf32 reach half of `bf16` (dense) on all of these."""

    device: str
    gpu: GPUTarget
    shared: int  # bytes that a block may have
    memory: float
    float32: float
    bf16: float
    exp: float


# NVIDIA's A100 80GB SXM, H100 SXM and HGX B200 data sheets, AMD's MI300X data sheet. Shared memory: CUDA programming guide, table of
# compute capabilities (163, 227, 227 KB); CDNA3 ISA guide (64 KB). Exponentials: 16 a clock and multiprocessor (CUDA programming guide,
# arithmetic throughput), as many per CDNA3 compute unit, times units and clock.
TARGETS = {
    "sm_80": Target("A100 80GB", GPUTarget("cuda", 80, 32), 163 * 1024, 2.039e12, 19.5e12, 312e12, 2.4e12),
    "sm_90": Target("H100 SXM", GPUTarget("cuda", 90, 32), 227 * 1024, 3.35e12, 66.9e12, 989e12, 4.2e12),
    "sm_100": Target("B200", GPUTarget("cuda", 100, 32), 227 * 1024, 8e12, 75e12, 2250e12, 4.7e12),
    "gfx942": Target("MI300X", GPUTarget("hip", "gfx942", 64), 64 * 1024, 5.3e12, 163.4e12, 1307e12, 10.2e12),
}


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int  # NVIDIA: bytes stored; AMD: registers
    stack: int  # bytes
    shared: int  # bytes
    matrix: int  # matrix instructions in the text
    products: int  # dots in the source that must have them: of 16 bits, or of tf32


def resources(kernel) -> Resources:
    """Of a kernel that Triton compiled."""
    read = _nvidia if kernel.metadata.target.backend == "cuda" else _amd
    return Resources(*read(kernel), products=sum(precision != "float32" for precision, _ in _dots(kernel.asm["ttir"])))


def _nvidia(kernel) -> tuple[int, ...]:
    log = _ptxas(kernel)
    stack, spills, loads = (
        int(n) for n in re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", kernel.asm["ptx"]))
    return registers, max(spills, loads), stack, kernel.metadata.shared, matrix


def _ptxas(kernel) -> str:
    """What `ptxas -v` says, run as Triton runs it: its own call, whose result is in the cache already, again."""
    backend, arch = make_backend(kernel.metadata.target), kernel.metadata.target.arch
    options = backend.parse_options(kernel.metadata._asdict())
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, arch)
    return log.getvalue()


def _amd(kernel) -> tuple[int, ...]:
    text = kernel.asm["amdgcn"]
    registers, spills, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, spills, stack, kernel.metadata.shared, len(re.findall(r"\bv_s?mfma\w+", text))


def faults(found: Resources, target: Target) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    wrong = []
    if found.spills:
        wrong.append(
            f"spills {found.spills} {'bytes' if target.gpu.backend == 'cuda' else 'registers'} (it has {found.registers} registers)"
        )
    if found.stack:
        wrong.append(f"uses {found.stack} bytes of stack")
    if found.shared > target.shared:
        wrong.append(f"takes {found.shared} bytes of shared memory, {target.shared} is the most")
    if found.products and not found.matrix:
        wrong.append(f"has {found.products} products of 16 bits or tf32 and no matrix instruction")
    return wrong


def roofline(size: int, work: dict[str, float], target: Target) -> dict[str, float]:
    """Seconds by limit."""
    return {
        "memory": size / target.memory, "float32": work["float32"] / target.float32, "exp": work["exp"] / target.exp,
        "matrix": work["bf16"] / target.bf16 + work["tf32"] / (target.bf16 / 2),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- operations

INTEGER = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "divsi": operator.floordiv, "remsi": operator.mod,
    "minsi": min, "maxsi": max, "extsi": int, "trunci": int,
}  # fmt: skip
FLOAT = re.compile(r" arith\.(?:addf|subf|mulf|divf|maximumf|minimumf|maxnumf|minnumf) | math\.(\w+) ")
FOR = re.compile(r"scf\.for (%[\w-]+) = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)")
REDUCTION = re.compile(r'"tt\.(?:reduce|scan)"\([^)]*\)[^\n]*\(\{(.*?)\}\)[^\n]*? : \(tensor<([\dx]+)x\w+>', re.DOTALL)
DOT = re.compile(r"tt\.dot [^\n]*?: tensor<([\dx]+)x(\w+)> \* tensor<[\dx]+x\w+> -> tensor<([\dx]+)x\w+>")


def operations(ttir: str, arguments: list, grid: tuple[int, ...]) -> dict[str, float]:
    """Floating-point operations of a launch by kind: float32, exp, tf32 and bf16 (products). Loops count as often as they run in the
    program in the middle of the grid, or once where that cannot be told; both arms of a branch count, padding and masked elements too."""
    text = REDUCTION.sub(lambda m: re.sub(r" : f\d+", f" : tensor<{m[2]}xf32>", m[1]), ttir)
    entry = text.index("tt.func public")
    known = dict(zip(re.findall(r"(%[\w-]+): ", text[entry : text.index("\n", entry)]), arguments, strict=False))
    total, times = dict.fromkeys(("float32", "exp", "tf32", "bf16"), 0.0), [prod(grid)]
    for line in text[entry:].splitlines():
        line = line.split(" loc(")[0].strip() if "tt.func" not in line else "{"
        if line.startswith("}"):
            times.pop()
        if line.endswith("{"):
            times.append(times[-1] * _trips(line, known))
        elif dots := _dots(line):
            kind, amount = dots[0]
            total[kind] += times[-1] * amount
        elif found := FLOAT.search(line):
            total["exp" if found[1] in ("exp", "exp2") else "float32"] += times[-1] * _elements(line)
        elif "tensor<" not in line:
            _scalar(line, known, grid)
    return total


def _dots(text: str) -> list[tuple[str, int]]:
    """(kind, operations) of each product of matrices; those of float32 in several narrower parts count as many times."""
    found = []
    for match in DOT.finditer(text):
        precision = re.search(r"inputPrecision = (\w+)", match[0])
        name, _, parts = (precision[1] if precision else "ieee").partition("x")
        kind = name if match[2] == "f32" and name != "ieee" else {"f32": "float32", "f64": "float32"}.get(match[2], "bf16")
        left, out = ([int(n) for n in shape.split("x")] for shape in (match[1], match[3]))
        found.append((kind, 2 * prod(out) * left[-1] * int(parts or 1)))
    return found


def _elements(line: str) -> int:
    shape = re.findall(r"tensor<([\dx]+)x\w+>", line)
    return prod(int(n) for n in shape[-1].split("x")) if shape else 1


def _trips(line: str, known: dict) -> int:
    loop = FOR.search(line)
    if not loop:
        return 1
    first, last, step = (known.get(name) for name in loop.groups()[1:])
    if None in (first, last, step):
        return 1
    known[loop[1]] = (first + last) // 2  # for loops inside whose bounds depend on it
    return max(0, ceil((last - first) / step))


def _scalar(line: str, known: dict, grid: tuple[int, ...]) -> None:
    """Follows the integers that the bounds of loops come from."""
    if constant := re.match(r"(%[\w-]+) = arith\.constant (-?\d+) : i", line):
        known[constant[1]] = int(constant[2])
    elif program := re.match(r"(%[\w-]+) = tt\.get_(program_id|num_programs) ([xyz])", line):
        axis = "xyz".index(program[3])
        size = grid[axis] if axis < len(grid) else 1
        known[program[1]] = size // 2 if program[2] == "program_id" else size
    elif step := re.match(r"(%[\w-]+) = arith\.(\w+) (.*?) :", line):
        values = [known.get(name) for name in re.findall(r"%[\w-]+", step[3])]
        if step[2] in INTEGER and None not in values:
            known[step[1]] = INTEGER[step[2]](*values)
