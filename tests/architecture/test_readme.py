"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.architecture.tree import page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path):
    (example,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "from convert import" in block
    )
    brief = "import pytest, tests.conftest; tests.conftest.measure_briefly(pytest.MonkeyPatch())\n"
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CONVERT_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # other tests use the other cores
    }
    done = subprocess.run(
        [sys.executable, "-c", brief + example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").exists()


def test_the_file_tree_names_every_folder_and_no_other():
    tree = README.split("## The files")[1].split("```")[1]
    named = set(re.findall(r"^([\w/]+)/", tree, re.MULTILINE))
    inside = {f"convert/{f.name}" for f in (ROOT / "convert").iterdir() if any(f.glob("[!_.]*.*")) and f.is_dir()}
    assert named == inside | {"convert", "kernels", "experiments", "tests", "docs"}
    for word in set(re.findall(r"[\w/]+\.(?:py|md)\b", tree)) - {"report.md"}:
        assert any((ROOT / place / word).exists() for place in ("", "convert", "docs", "experiments")), word


def test_the_page_of_the_architecture_is_up_to_date():
    assert (ROOT / "docs" / "ARCHITECTURE.md").read_text() == page(), "python -m tests.architecture.tree"


def test_every_file_says_what_it_is():
    assert not [line for line in page().splitlines() if line.startswith("* `") and line.endswith(": ")]


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / link).exists(), (file.name, link)


def test_every_command_of_the_readme_has_its_flags():
    for module in ("convert.run", "convert.teach", "convert.evaluate", "convert.generate"):
        shown = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for line in re.findall(rf"python -m {re.escape(module)} ([^#\n]*)", README):
            for flag in re.findall(r"(--[a-z-]+)", line):
                assert flag in shown, (module, flag)
