"""Statistics of a compiled Triton kernel, read from its texts: registers, spills, shared memory, operations."""

import contextlib
import dataclasses
import io
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod

import triton
from triton.compiler.compiler import CompiledKernel, make_backend

from kernels.gpu_specs import GpuSpec

# ----------------------------------------------------------------------------------------------------------- resources

MAX_REGISTERS = 255  # of a thread, on NVIDIA
SMALL_SPILL = 16  # bytes of a thread (ours)


@dataclass(frozen=True)
class Resources:
    """Resources of a GPU that a compiled kernel takes."""

    registers: int
    spills: int  # NVIDIA: bytes stored; AMD: registers
    stack: int  # bytes
    shared: int  # bytes
    matrix: int  # matrix instructions in its text
    products: int  # dots in the source that need matrix instructions: of 16 bits, or of tf32


def resources(kernel: CompiledKernel) -> Resources:
    """Read the resources of a kernel that Triton compiled."""
    read = _nvidia_resources if kernel.metadata.target.backend == "cuda" else _amd_resources
    products = sum(kind != "float32" for kind, _ in _dots(kernel.asm["ttir"]))
    registers, spills, stack, matrix = read(kernel)
    return Resources(registers, spills, stack, kernel.metadata.shared, matrix, products)


def faults(found: Resources, spec: GpuSpec) -> list[str]:
    """Return what is wrong with a compiled kernel on a GPU, in words."""
    wrong = []
    if _is_choice(found, spec):
        found = dataclasses.replace(found, spills=0, stack=0)
    if found.spills:
        unit = "bytes" if spec.gpu.backend == "cuda" else "registers"
        wrong.append(f"spills {found.spills} {unit} (it has {found.registers} registers)")
    if found.stack:
        wrong.append(f"uses {found.stack} bytes of stack")
    if found.shared > spec.shared:
        wrong.append(f"takes {found.shared} bytes of shared memory, {spec.shared} is the most")
    if found.products and not found.matrix:
        wrong.append(f"has {found.products} products of 16 bits or tf32 and no matrix instruction")
    return wrong


def _is_choice(found: Resources, spec: GpuSpec) -> bool:
    """Return whether ptxas spilled a few bytes though a thread may have more registers: it does so to keep another
    block on a multiprocessor, and whether it does changes from version to version."""
    few = found.spills <= SMALL_SPILL and found.stack <= SMALL_SPILL + 8  # a stack is of whole 8 bytes
    return spec.gpu.backend == "cuda" and found.registers < MAX_REGISTERS and few


def _nvidia_resources(kernel: CompiledKernel) -> tuple[int, int, int, int]:
    log = _ptxas_log(kernel)
    stack, stores, loads = (
        int(_group(rf"(\d+) bytes {name}", log)) for name in ("stack frame", "spill stores", "spill loads")
    )
    registers = int(_group(r"Used (\d+) registers", log))
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", kernel.asm["ptx"]))
    return registers, max(stores, loads), stack, matrix


def _ptxas_log(kernel: CompiledKernel) -> str:
    """Return what `ptxas -v` prints, by repeating Triton's own call of it, whose result is cached."""
    backend, arch = make_backend(kernel.metadata.target), kernel.metadata.target.arch
    options = backend.parse_options(kernel.metadata._asdict())
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], {}, options, arch)
    return log.getvalue()


def _amd_resources(kernel: CompiledKernel) -> tuple[int, int, int, int]:
    text = kernel.asm["amdgcn"]
    registers, spills, stack = (
        int(_group(rf"\.{name}:\s+(\d+)", text))
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, spills, stack, len(re.findall(r"\bv_s?mfma\w+", text))


def _group(pattern: str, text: str) -> str:
    """Return the first group of the first match; raise ValueError where a newer compiler writes something else."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"The compiler's output has no {pattern!r}; this version of Triton is not known here.")
    return match[1]


# ---------------------------------------------------------------------------------------------------------- operations

INTEGER_OPERATIONS: dict[str, Callable[..., int]] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": operator.floordiv,
    "remsi": operator.mod,
    "minsi": min,
    "maxsi": max,
    "extsi": int,
    "trunci": int,
}
FLOAT_OPERATION = re.compile(r" arith\.(?:addf|subf|mulf|divf|maximumf|minimumf|maxnumf|minnumf) | math\.(\w+) ")
FOR_LOOP = re.compile(r"scf\.for (%[\w-]+) = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)")
REDUCTION = re.compile(r'"tt\.(?:reduce|scan)"\([^)]*\)[^\n]*\(\{(.*?)\}\)[^\n]*? : \(tensor<([\dx]+)x\w+>', re.DOTALL)
DOT = re.compile(r"tt\.dot [^\n]*?: tensor<([\dx]+)x(\w+)> \* tensor<[\dx]+x\w+> -> tensor<([\dx]+)x\w+>")


def operations(ttir: str, arguments: Sequence[int | None], grid: tuple[int, ...]) -> dict[str, float]:
    """Count the floating-point operations of a launch by kind: float32, exp, and the products tf32 and bf16.

    A loop counts as often as it runs in the program in the middle of the grid, or once where that cannot be told. Both
    arms of a branch count, and so do padding and masked elements.

    Args:
        ttir: the kernel in Triton's intermediate representation.
        arguments: its arguments in order; None for those that are not integers.
        grid: programs of the launch along each axis.
    """
    text = REDUCTION.sub(lambda m: re.sub(r" : f\d+", f" : tensor<{m[2]}xf32>", m[1]), ttir)
    entry = text.index("tt.func public")
    names = re.findall(r"(%[\w-]+): ", text[entry : text.index("\n", entry)])
    known = {name: value for name, value in zip(names, arguments, strict=False) if value is not None}
    totals, repeats = dict.fromkeys(("float32", "exp", "tf32", "bf16"), 0.0), [prod(grid)]
    for line in text[entry:].splitlines():
        line = line.split(" loc(")[0].strip() if "tt.func" not in line else "{"
        if line.startswith("}"):
            repeats.pop()
        if line.endswith("{"):
            repeats.append(repeats[-1] * _trip_count(line, known))
        elif dots := _dots(line):
            kind, count = dots[0]
            totals[kind] += repeats[-1] * count
        elif match := FLOAT_OPERATION.search(line):
            totals["exp" if match[1] in ("exp", "exp2") else "float32"] += repeats[-1] * _elements(line)
        elif "tensor<" not in line:
            _evaluate_scalar(line, known, grid)
    return totals


def _dots(text: str) -> list[tuple[str, int]]:
    """Return (kind, operations) of each matrix product; one of float32 in several tf32 parts counts as many times."""
    found = []
    for match in DOT.finditer(text):
        precision = re.search(r"inputPrecision = (\w+)", match[0])
        name, _, parts = (precision[1] if precision else "ieee").partition("x")
        by_dtype = {"f32": "float32", "f64": "float32"}.get(match[2], "bf16")
        kind = name if match[2] == "f32" and name != "ieee" else by_dtype
        left, out = ([int(n) for n in shape.split("x")] for shape in (match[1], match[3]))
        found.append((kind, 2 * prod(out) * left[-1] * int(parts or 1)))
    return found


def _elements(line: str) -> int:
    shape = re.findall(r"tensor<([\dx]+)x\w+>", line)
    return prod(int(n) for n in shape[-1].split("x")) if shape else 1


def _trip_count(line: str, known: dict[str, int]) -> int:
    loop = FOR_LOOP.search(line)
    if not loop or not all(name in known for name in loop.groups()[1:]):
        return 1
    first, last, step = (known[name] for name in loop.groups()[1:])
    known[loop[1]] = (first + last) // 2  # for the bounds of inner loops that depend on it
    return max(0, ceil((last - first) / step))


def _evaluate_scalar(line: str, known: dict[str, int], grid: tuple[int, ...]) -> None:
    """Add the integer that a line computes to `known`: the bounds of loops come from such integers."""
    if constant := re.match(r"(%[\w-]+) = arith\.constant (-?\d+) : i", line):
        known[constant[1]] = int(constant[2])
    elif program := re.match(r"(%[\w-]+) = tt\.get_(program_id|num_programs) ([xyz])", line):
        axis = "xyz".index(program[3])
        size = grid[axis] if axis < len(grid) else 1
        known[program[1]] = size // 2 if program[2] == "program_id" else size
    elif step := re.match(r"(%[\w-]+) = arith\.(\w+) (.*?) :", line):
        values = [known.get(name) for name in re.findall(r"%[\w-]+", step[3])]
        if step[2] in INTEGER_OPERATIONS and None not in values:
            known[step[1]] = INTEGER_OPERATIONS[step[2]](*values)
