"""docs/ARCHITECTURE.md, made of the first sentence of every file and of the imports that folders are allowed.

python -m tests.architecture.tree > docs/ARCHITECTURE.md
"""

import ast
import re
from pathlib import Path

from tests.architecture.test_imports import MAY_IMPORT, ROOT

HEAD = """# Architecture

Data flows one way: a teacher is loaded, its attention layers are read into `Projections`, a mixer starts from them, a
step swaps it in or trains it, a recipe orders the steps, a plan says what they cost, and the pipeline runs them,
measures, and writes reports. A run knows its models, data and numbers through a `Domain` alone: one is for text, one
for images.

`python -m tests.architecture.tree > docs/ARCHITECTURE.md` makes this page of the first sentence of every file;
`tests/architecture/test_imports.py` enforces the table.

## Which folder imports which

| folder | may import |
|---|---|
"""


def sentence(file: Path) -> str:
    """The first sentence of a file's docstring, or of its first comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = (line.strip(" /*!-<>") for line in text.splitlines()[:6])
        text = "\n".join(line for line in lines if line and not line.startswith(("doctype", "#")))
    first = re.split(r"(?<=[.?])\s|\n\n", " ".join(text.split("\n\n")[0].split()))[0] if text else ""
    return first.rstrip(":")


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip("\n")]
    lines += [
        f"| `{folder}` | {', '.join(f'`{name}`' for name in may.split()) or 'none'} |"
        for folder, may in MAY_IMPORT.items()
    ]
    lines += ["", "## Files"]
    suffixes = (".py", ".cpp", ".h", ".html")
    for top in ("convert", "kernels", "experiments"):
        folders = sorted(
            {f.parent for f in (ROOT / top).rglob("*") if f.suffix in suffixes and "__pycache__" not in f.parts}
        )
        for folder in folders:
            files = [f for f in sorted(folder.iterdir()) if f.suffix in suffixes and f.read_text().strip()]
            if files:
                lines += ["", f"### {folder.relative_to(ROOT)}/", ""]
                lines += [f"* `{file.name}`: {sentence(file)}" for file in files]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
