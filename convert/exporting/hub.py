"""A student as a Hugging Face model folder that needs nothing of ours: weights, tokenizer, card, and the code as flat
files.

transformers copies only flat `from .name import` files beside a model, so module a.b.c travels as a_b_c.py and its
import lines are rewritten. The only test that counts is a process that cannot import our packages:
`check_in_clean_process`."""

import ast
import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.fields import Place, checked
from convert.exporting.native import to_native
from convert.exporting.portability import make_rotary_portable, make_tokenizer_portable
from convert.models.student import ConvertedForCausalLM

ROOT = Path(__file__).resolve().parents[2]
IS_WHEEL = (Path(__file__).resolve().parents[1] / "kernels").is_dir()  # which has the kernels inside `convert`
OURS = ("convert",) if IS_WHEEL else ("convert", "kernels")  # packages; their own __init__ stays at home
MAIN = "convert.models.student"
OLDEST = (5, 23)  # version of transformers that the code runs in; setup.py asks for the same
NATIVE_MARK = ".converted"  # an empty file that says who wrote the folder
AUTO_MAP = {
    "AutoConfig": "convert_models_student.ConvertedConfig",
    "AutoModelForCausalLM": "convert_models_student.ConvertedForCausalLM",
}


@checked
def export(
    student: ConvertedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Place,
    *,
    card: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `folder`, with the weights in `dtype` (None: as they are) and our code beside them; the student stays as it
    is."""
    config = copy.deepcopy(student.config)
    config.auto_map = dict(AUTO_MAP)
    _replace(
        Path(folder),
        f"{_flat(MAIN)}.py",
        lambda side: _write(student, config, tokenizer, side, card, dtype, model_code()),
    )


@checked
def export_native(
    student: ConvertedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Place,
    *,
    card: str,
    dtype: torch.dtype | None = None,
) -> None:
    """The same as an architecture of transformers, without code; `native.obstacle` says whether there is one."""
    model = to_native(student)

    def write(side: Path) -> None:
        _write(model, model.config, tokenizer, side, card, dtype, {NATIVE_MARK: ""})
        make_rotary_portable(side)

    _replace(Path(folder), NATIVE_MARK, write)


def _replace(folder: Path, mark: str, write: Callable[[Path], None]) -> None:
    """Have `write` fill the folder, in which a file `mark` shows an earlier export.

    All is written beside it first. An earlier export in its place goes only when the new one is complete, by two
    renames: killed exactly between them, the old one is `NAME.replaced` and the next export starts by putting it back.
    """
    side, replaced = (folder.with_name(folder.name + end) for end in (".writing", ".replaced"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / mark).exists():
        raise UserError(
            f"An export replaces its folder, and {folder} is not an earlier export. Name another, or move it away."
        )
    shutil.rmtree(side, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    side.mkdir(parents=True)
    try:
        write(side)
        if folder.exists():
            folder.rename(replaced)
        side.rename(folder)
    except BaseException:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(side, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _write(
    model: PreTrainedModel, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str,
    dtype: torch.dtype | None, code: dict[str, str],
) -> None:  # fmt: skip
    for name, source in code.items():
        (folder / name).write_text(source, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder, tokenizer)
    config.architectures = [type(model).__name__]
    config.dtype = dtype or model.dtype
    config.save_pretrained(folder)
    # not save_pretrained, which refuses settings of a published teacher that transformers itself only warns about
    model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])
    save_torch_state_dict(_weights(model, dtype), folder, metadata={"format": "pt"})


def _weights(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state, cast, in the computer's memory, without the tensors that loading ties to others again."""
    state, tied = model.state_dict(), model.get_expanded_tied_weights_keys(all_submodels=True)
    return {
        name: tensor.to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.items()
        if name not in tied or tensor.data_ptr() != state[tied[name]].data_ptr()
    }


def model_code() -> dict[str, str]:
    """File name -> source: all that `convert.models.student` imports of ours, directly or not."""
    modules, code = [MAIN], {}
    for module in modules:  # grows while it is read
        name = f"{_flat(module)}.py"
        if name in code:
            raise ValueError(
                f"Exported modules need different flat names; {module} is one of two that become {name}. Rename it."
            )
        path = _path(module)
        source, imported = flatten(path.read_text(encoding="utf-8"), module)
        code[name] = f"# Generated from {path.relative_to(ROOT).as_posix()}: edit that file, not this one.\n{source}"
        modules += sorted(imported - set(modules))
    main = f"{_flat(MAIN)}.py"
    comment, source = code[main].split("\n", 1)
    code[main] = f"{comment}\n{_guard([name.removesuffix('.py') for name in code if name != main])}{source}"
    return code


def _guard(names: list[str]) -> str:
    """The head of the file that transformers runs first. An older one copies only the files that this one names,
    without those that they name, and would fail before it ran any."""
    version = ".".join(map(str, OLDEST))
    files = "".join(f"    from .{name} import *\n" for name in names)
    return (
        f"import transformers\n\nif tuple(int(part) for part in transformers.__version__.split('.')[:2]) < {OLDEST}:\n "
        f"   raise ImportError('This model needs transformers {version} or later, and this is ' +"
        " transformers.__version__ + '.')\nif False:  # all files of this model, for versions that copy only what is"
        f" named here\n{files}\n"
    )


def flatten(source: str, module: str) -> tuple[str, set[str]]:
    """The source with `from a.b import c` of ours as `from .a_b import c`, and the modules it imports.

    The registrations with transformers' Auto classes are left out: registered classes win over a folder's own code, so
    the next student loaded in the same process would silently run the code of this one."""
    tree, lines, imported = ast.parse(source), source.splitlines(keepends=True), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in OURS for alias in node.names):
            raise _cannot_flatten(node, module)
        if not isinstance(node, ast.ImportFrom) or not (node.level or node.module.split(".")[0] in OURS):
            continue
        if node.level or node.module in OURS or _submodules(node.module) & {alias.name for alias in node.names}:
            raise _cannot_flatten(node, module)
        statement = rf"\bfrom\s+{re.escape(node.module)}\s+import\b"  # the names may go on in the next lines
        lines[node.lineno - 1], count = re.subn(
            statement, f"from .{_flat(node.module)} import", lines[node.lineno - 1], count=1
        )
        if count != 1:
            raise _cannot_flatten(node, module)
        imported.add(node.module)
    for node in tree.body:
        if isinstance(node, ast.Expr) and re.match(r"Auto\w+\.register\(", ast.unparse(node)):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines).rstrip() + "\n", imported


def _cannot_flatten(node: ast.stmt, module: str) -> ValueError:
    return ValueError(
        f"Exported code imports names, as `from package.module import name`; {module}, line {node.lineno}, has"
        f" `{ast.unparse(node)}`."
    )


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _submodules(module: str) -> set[str]:
    path = _path(module)
    return {entry.stem for entry in path.parent.iterdir()} if path.name == "__init__.py" else set()


# Runs before a script in a clean process. Only our two packages are hidden, wherever an editable install or a .pth file
# puts
# them: Hugging Face's `kernels`, which transformers imports, must stay importable.
HIDE = """
import os, sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        if spec is None or name.split(".")[0] not in OURS:
            return spec
        places = [spec.origin or "", *(spec.submodule_search_locations or ())]
        hidden = [os.path.join(ROOT, package) + os.sep for package in OURS]
        return None if any(os.path.join(os.path.realpath(p), "").startswith(tuple(hidden)) for p in places) else spec

sys.path[:] = [p for p in sys.path if os.path.realpath(p) != REPOSITORY]
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

LOGITS = """
import torch
from transformers import AutoModelForCausalLM

folder, inputs, outputs, trust = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust == "True", dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.load(inputs), use_cache=False).logits
torch.save(logits, outputs)
"""


def check_in_clean_process(folder: Path, input_ids: Tensor, *, trust_remote_code: bool = True) -> Tensor:
    """The logits [B, T, W] of these tokens [B, T], in float32 on the CPU, by a process that has only the folder."""
    with tempfile.TemporaryDirectory() as place:
        inputs, outputs = Path(place, "inputs.pt"), Path(place, "outputs.pt")
        torch.save(input_ids.cpu(), inputs)
        run_without_us(LOGITS, str(folder.resolve()), str(inputs), str(outputs), str(trust_remote_code))
        return torch.load(outputs)


def run_without_us(script: str, *args: str) -> str:
    """What a Python script prints (arguments from sys.argv[1]) offline, in an empty folder, where our packages cannot
    be imported."""
    with tempfile.TemporaryDirectory() as place:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_MODULES_CACHE": str(Path(place, "modules")),
        }
        repository = None if IS_WHEEL else str(ROOT)  # beside a wheel are all other packages
        head = f"ROOT, OURS, REPOSITORY = {str(ROOT)!r}, {OURS!r}, {repository!r}\n{HIDE}"
        done = subprocess.run(
            [sys.executable, "-c", head + script, *args],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise RuntimeError(f"A clean process failed with exit code {done.returncode}:\n{tail}")
    return done.stdout
