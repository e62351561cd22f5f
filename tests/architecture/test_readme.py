"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path):
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from convert import" in block
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CONVERT_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").exists()


def test_the_file_tree_names_every_file_and_no_other():
    tree = README.split("## The files")[1].split("```")[1]
    parts = dict(re.findall(r"^(convert|kernels|experiments)/(.*?)(?=^\w|\Z)", tree, re.DOTALL | re.MULTILINE))
    for folder, text in parts.items():
        named = set(re.findall(r"[\w-]+\.(?:py|cpp|h|html)\b", text))
        files = {f.name for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".cpp", ".h", ".html")} - {
            "report.html"
        }
        assert named - {"report.html"} - files == set() and files - named - {"__init__.py"} == set(), folder
    assert len(parts) == 3


def test_every_command_of_the_readme_has_its_flags():
    for module in ("convert.run", "convert.evaluate", "convert.generate"):
        shown = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for line in re.findall(rf"python -m {re.escape(module)} ([^#\n]*)", README):
            for flag in re.findall(r"(--[a-z-]+)", line):
                assert flag in shown, (module, flag)
