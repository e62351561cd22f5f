"""What a run hands over: model/, and native/ where there is one, each read back in a process that does not know this
project."""

import shutil
from pathlib import Path

import torch

from convert.core.console import console
from convert.core.errors import UserError, disk_reason
from convert.data.text import TokenData
from convert.exporting import native
from convert.exporting.hub import check_in_clean_process, export, export_native
from convert.models.loading import Teacher
from convert.reports import report as reports
from convert.reports.language import LANGUAGE
from convert.runs.language_schemas import LanguageReport


def ship(student, taught: Teacher, folder: Path, report: LanguageReport, text: TokenData) -> dict:
    """Write model/, and read it back in a process that does not know this project."""
    console.print("export", style="bold")
    export(student, taught.tokenizer, folder, card=reports.card(report, LANGUAGE), dtype=taught.dtype)
    found = _checked(student, folder, text, trust_remote_code=True) | {
        "dtype": str(taught.dtype).removeprefix("torch.")
    }
    if reason := native.obstacle(student):
        console.print(
            f"transformers has no architecture for this student ({reason}): model/ brings its code along.", style="dim"
        )
        return found | {"native": {"obstacle": reason}}
    beside, kind = folder.with_name("native"), native.native_config(student).model_type
    try:
        export_native(
            student, taught.tokenizer, beside, card=reports.card(report, LANGUAGE, native=True), dtype=taught.dtype
        )
        checked = _checked(student, beside, text, trust_remote_code=False)
    except (RuntimeError, OSError, UserError) as error:  # model/ is good, and the run with it
        if disk_reason(error):
            raise
        console.print(f"native/ could not be made: {error}", style="yellow")
        return found | {"native": {"obstacle": f"the export as a {kind} failed: {error}"}}
    console.print(f"native/ is the same student as a {kind}, without code of ours.", style="dim")
    return found | {"native": {"model_type": kind} | checked}


def _checked(student, folder: Path, text: TokenData, *, trust_remote_code: bool) -> dict:
    """How far the logits of the export are from the student's, in a clean process; more than rounding is an error."""
    ids = torch.from_numpy(text.held_out.ids[:64].astype("int64"))[None]
    with torch.no_grad():
        reference = student(ids.to(student.device), use_cache=False).logits.float().cpu()
    allowed = max(1e-4, 1e-5 * reference.abs().max().item())
    try:
        difference = (
            (check_in_clean_process(folder, ids, trust_remote_code=trust_remote_code) - reference).abs().max().item()
        )
        if not difference <= allowed:
            raise RuntimeError(
                f"The export must give the same logits in a clean process; they differ by {difference:.2g} (allowed"
                f" {allowed:.2g})."
            )
    except (RuntimeError, OSError):
        _set_aside(folder)
        raise
    return {"max_abs_logit": difference, "allowed": allowed}


def _set_aside(folder: Path) -> None:
    """An export that failed its check: its card says that it passed."""
    aside = folder.with_name(folder.name + ".unchecked")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
