"""Operators of this project, beside Hugging Face's package of the same name.

transformers imports `kernels` while it starts, and means Hugging Face's. So this file imports nothing of ours and
defines no version. It shares its path with theirs (`kernels.layer`), and runs their `__init__` here when a name of
theirs is first asked for.
"""

import os
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
# Another copy of this package, or a link to it, must not be run: it would start this search again without end.
_their_init_files = [
    os.path.join(folder, "__init__.py")
    for folder in __path__[1:]
    if not os.path.isdir(os.path.join(folder, "selective_scan"))
]


def __getattr__(name: str) -> object:
    ours = any(os.path.exists(os.path.join(__path__[0], name + suffix)) for suffix in ("", ".py"))
    # `from kernels import selective_scan` calls this function before it looks for a module
    while _their_init_files and not ours:
        init = _their_init_files.pop()
        if os.path.isfile(init):
            with open(init, encoding="utf-8") as file:
                exec(compile(file.read(), init, "exec"), globals())
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
