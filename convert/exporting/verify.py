"""What a run hands over: model/, and native/ where there is one, each read back in a process that does not know this
project."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core.console import console
from convert.core.errors import UserError, disk_reason
from convert.core.processes import first_says, on_first
from convert.exporting import native
from convert.exporting.code import IS_WHEEL, OURS, ROOT
from convert.exporting.hub import export
from convert.models.sharding import copied
from convert.models.student import ConvertedForCausalLM


def export_and_verify(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, card: str, card_without_code: str,
    dtype: torch.dtype, input_ids: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Write `folder`, and native/ beside it where transformers has the architecture of a converted student, and read
    each back in a process that does not know this project.

    `card`: the model card of a folder that brings its code along; `card_without_code`: of one that does not.
    `input_ids` [B, T]: tokens whose logits are compared. Returns what report.json says of the export."""
    console.print("export", style="bold")
    is_converted = isinstance(student, ConvertedForCausalLM)
    export(student, tokenizer, folder, card=card if is_converted else card_without_code, dtype=dtype)
    found = verify(student, folder, input_ids, trust_remote_code=is_converted) | {
        "dtype": str(dtype).removeprefix("torch.")
    }
    if not is_converted:
        return found
    reason = native.obstacle(student)
    if reason is not None:
        console.print(
            f"transformers has no architecture for this student ({reason}): model/ brings its code along.", style="dim"
        )
        return found | {"native": {"obstacle": reason}}
    beside, kind = folder.with_name("native"), native.native_config(student).model_type
    try:
        made = native.to_native(student)
        in_full = native.in_full(student, made)
        export(made, tokenizer, beside, card=card_without_code, dtype=dtype, in_full=in_full)
        del made
        checked = verify(student, beside, input_ids, trust_remote_code=False)
    except (RuntimeError, OSError, UserError) as error:  # model/ is good, and the run with it
        if disk_reason(error):
            raise
        console.print(f"native/ could not be made: {error}", style="yellow")
        return found | {"native": {"obstacle": f"the export as a {kind} failed: {error}"}}
    console.print(f"native/ is the same student as a {kind}, without code of ours.", style="dim")
    return found | {"native": {"model_type": kind} | checked}


def verify(student: PreTrainedModel, folder: Path, input_ids: Tensor, *, trust_remote_code: bool) -> dict[str, float]:
    """How far the logits of an export are from the student's, in a clean process; more than rounding is an error.

    Many layers can amplify the rounding of float32 beyond what is allowed, where the two compute in another order: then
    the same comparison in float64, which leaves a real difference as it is, decides.

    `input_ids` [B, T]. Raises RuntimeError, and sets the folder aside, where they differ."""

    def differences(model: PreTrainedModel, dtype: torch.dtype) -> tuple[float, float]:
        with torch.no_grad():
            reference = model(input_ids.to(model.device), use_cache=False).logits.to("cpu", dtype)
        check = functools.partial(
            check_in_clean_process, folder, input_ids, trust_remote_code=trust_remote_code, dtype=dtype
        )
        logits = on_first(check)
        return (logits - reference).abs().max().item(), reference.abs().max().item()

    try:
        difference, largest = differences(student, torch.float32)
        allowed = max(1e-4, 1e-5 * largest)
        found = {"max_abs_logit": difference, "allowed": allowed}
        if first_says(not difference <= allowed) and student.device.type != "mps":  # which has no float64
            difference, _ = differences(copied(student, torch.float64), torch.float64)
            found["max_abs_logit_float64"] = difference
        if first_says(not difference <= allowed):
            raise RuntimeError(
                f"The export must give the same logits in a clean process; they differ by {difference:.2g} (allowed"
                f" {allowed:.2g})."
            )
    except (RuntimeError, OSError):
        on_first(set_aside, folder)
        raise
    return found


def set_aside(folder: Path) -> None:
    """Rename an export that failed its check, whose card says that it passed."""
    aside = folder.with_name(folder.name + ".unchecked")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


# Runs before a script in a clean process. Only our two packages are hidden, wherever an editable install or a .pth file
# puts them: Hugging Face's `kernels`, which transformers imports, must stay importable.
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

folder, inputs, outputs, trust, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust == "True", dtype=torch.float32).eval()
with torch.no_grad():
    logits = model.to(getattr(torch, dtype))(input_ids=torch.load(inputs), use_cache=False).logits
torch.save(logits, outputs)
"""


def check_in_clean_process(
    folder: Path, input_ids: Tensor, *, trust_remote_code: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The logits [B, T, W] of these tokens [B, T], in this dtype on the CPU, by a process that has only the folder."""
    with tempfile.TemporaryDirectory() as place:
        inputs, outputs = Path(place, "inputs.pt"), Path(place, "outputs.pt")
        torch.save(input_ids.cpu(), inputs)
        name = str(dtype).removeprefix("torch.")
        run_without_us(LOGITS, str(folder.resolve()), str(inputs), str(outputs), str(trust_remote_code), name)
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
