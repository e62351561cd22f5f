"""The code that an exported model brings along: the modules that run it, as flat files.

transformers copies only flat `from .name import` files beside a model, so module a.b.c travels as a_b_c.py and its
import lines are rewritten. Only what the model's own mixers need travels: the table of mixers is written anew."""

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from convert.mixers import MIXERS

ROOT = Path(__file__).resolve().parents[2]
IS_WHEEL = (ROOT / "convert" / "kernels").is_dir()  # a wheel has the kernels inside `convert`
OURS = ("convert",) if IS_WHEEL else ("convert", "kernels")  # packages; their own __init__ stays at home
CONFIG, MODEL, TABLE = "convert.models.config", "convert.models.student", "convert.mixers"
OLDEST = (5, 23)  # version of transformers that the code runs in; setup.py asks for the same


def model_code(mixers: Iterable[str]) -> dict[str, str]:
    """File name -> source: all that a converted model with these mixers imports of ours, directly or not."""
    return code_of([CONFIG, MODEL], mixers)


def code_of(first: Sequence[str], mixers: Iterable[str] = ()) -> dict[str, str]:
    """File name -> source: these modules and all that they import of ours, directly or not. transformers runs the first
    one first."""
    modules, code = list(first), dict[str, str]()
    for module in modules:  # grows while it is read
        name = f"{flat(module)}.py"
        if name in code:
            raise ValueError(
                f"Exported modules need different flat names; {module} is one of two that become {name}. Rename it."
            )
        path = _path(module)
        source = _table(mixers) if module == TABLE else path.read_text(encoding="utf-8")
        source, imported = flatten(source, module)
        code[name] = f"# Generated from {path.relative_to(ROOT).as_posix()}: edit that file, not this one.\n{source}"
        modules += sorted(imported - set(modules))
    head, *others = code
    comment, source = code[head].split("\n", 1)
    code[head] = f"{comment}\n{_guard([name.removesuffix('.py') for name in others])}{source}"
    return code


def _table(mixers: Iterable[str]) -> str:
    """The source of convert/mixers/__init__.py with these mixers alone."""
    kinds = {name: MIXERS[name] for name in sorted(set(mixers))}
    imports = "".join(f"from {kind.__module__} import {kind.__name__}\n" for kind in kinds.values())
    entries = ", ".join(f'"{name}": {kind.__name__}' for name, kind in kinds.items())
    return f'"""The mixers of this model."""\n\n{imports}\nMIXERS = {{{entries}}}\n'


def _guard(names: list[str]) -> str:
    """The head of the file that transformers runs first, which refuses versions that the code does not fit. An older
    transformers copies only the files that this one names, without those that they name, and would fail before it ran
    any."""
    version = ".".join(map(str, OLDEST))
    files = "".join(f"    from .{name} import *\n" for name in names)
    if files:
        files = f"if False:  # all files of this model, for versions that copy only what is named here\n{files}"
    here = "tuple(int(part) for part in transformers.__version__.split('.')[:2])"
    message = f"'This model needs transformers {version} or later, and this is ' + transformers.__version__ + '.'"
    return f"import transformers\n\nif {here} < {OLDEST}:\n    raise ImportError({message})\n{files}\n"


def flatten(source: str, module: str) -> tuple[str, set[str]]:
    """The source in which `from a.b import c` of our modules reads `from .a_b import c`, and the modules it imports.

    The registrations with transformers' Auto classes are left out: registered classes win over a folder's own code, so
    the next student loaded in the same process would silently run the code of this one."""
    tree, lines, imported = ast.parse(source), source.splitlines(keepends=True), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in OURS for alias in node.names):
            raise _cannot_flatten(node, module)
        if not isinstance(node, ast.ImportFrom):
            continue
        source_module = node.module or ""
        if not node.level and source_module.split(".")[0] not in OURS:
            continue
        if node.level or source_module in OURS or _submodules(source_module) & {alias.name for alias in node.names}:
            raise _cannot_flatten(node, module)
        statement = rf"\bfrom\s+{re.escape(source_module)}\s+import\b"  # the names may go on in the next lines
        lines[node.lineno - 1], count = re.subn(
            statement, f"from .{flat(source_module)} import", lines[node.lineno - 1], count=1
        )
        if count != 1:
            raise _cannot_flatten(node, module)
        imported.add(source_module)
    for node in tree.body:
        if isinstance(node, ast.Expr) and re.match(r"Auto\w+\.register\(", ast.unparse(node)):
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
    return "".join(lines).rstrip() + "\n", imported


def _cannot_flatten(node: ast.stmt, module: str) -> ValueError:
    return ValueError(
        f"Exported code imports names, as `from package.module import name`; {module}, line {node.lineno}, has"
        f" `{ast.unparse(node)}`."
    )


def flat(module: str) -> str:
    """The name of the file, without its end, that a module travels as."""
    return module.replace(".", "_")


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _submodules(module: str) -> set[str]:
    path = _path(module)
    return {entry.stem for entry in path.parent.iterdir()} if path.name == "__init__.py" else set()
