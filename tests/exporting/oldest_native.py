"""Whether transformers 4.57, which serving engines still use, reads what we export: two commands, one for each
environment.

python -m tests.exporting.oldest_native write FOLDER          # here: exports and their logits
OLD/bin/python tests/exporting/oldest_native.py read FOLDER   # with transformers 4.57: exit code 1 if any differ
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ALLOWED = 1e-4  # of logits about 10; measured: 3e-5
TEXT = "def add(a, b):\n    return a + b  # é <|endoftext|>"


def write(place: Path) -> None:
    from convert.exporting.hub import export
    from convert.exporting.native import to_native
    from convert.models.catalog import NANO
    from tests.conftest import token_ids
    from tests.exporting.test_native import CASES, student_of

    tokenizer, ids = AutoTokenizer.from_pretrained(NANO), token_ids()
    for name, case in CASES.items():
        student, folder = student_of(*case), place / name.replace(" ", "-")
        export(to_native(student), tokenizer, folder, card=name)
        with torch.no_grad():
            logits = student(ids, use_cache=False).logits
        greedy = student.generate(ids[:, :9], max_new_tokens=12, do_sample=False)
        torch.save(
            {"ids": ids, "logits": logits, "greedy": greedy, "tokens": tokenizer(TEXT)["input_ids"]},
            folder.with_suffix(".pt"),
        )
    export(student, tokenizer, place / "model", card="with code")


def read(place: Path) -> None:
    found = sorted(place.glob("*.pt"))
    assert len(found) >= 8, f"There are {len(found)} exports in {place}; write them first."
    for file in found:
        expected, folder = torch.load(file), file.with_suffix("")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = (model(expected["ids"], use_cache=False).logits - expected["logits"]).abs().max().item()
        greedy = model.generate(expected["ids"][:, :9], max_new_tokens=12, do_sample=False)
        tokens = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
        print(f"{file.stem}: logits differ by {difference:.2g}")
        assert difference <= ALLOWED and torch.equal(greedy, expected["greedy"]) and tokens == expected["tokens"], (
            file.stem
        )
    try:
        AutoModelForCausalLM.from_pretrained(place / "model", trust_remote_code=True)
    except ImportError as error:
        assert "needs transformers" in str(error), error
        print(f"model/: {error}")
    else:
        raise AssertionError("model/ with code was loaded by a version that it does not say it runs in")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
