"""Our operators, beside Hugging Face's package of the same name.

transformers imports `kernels` while it starts, and means theirs. So this file imports nothing, defines no version,
shares its path with theirs (`kernels.layer`), and runs their `__init__` here when a name of theirs is first asked for.
"""

import os
from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
# another copy or link of ours must not be run: it would start this search anew, for ever
_theirs = [os.path.join(folder, "__init__.py") for folder in __path__[1:] if not os.path.isdir(os.path.join(folder, "selective_scan"))]


def __getattr__(name):
    ours = any(os.path.exists(os.path.join(__path__[0], name + end)) for end in ("", ".py"))
    # `from kernels import selective_scan` asks here first
    while _theirs and not ours:
        init = _theirs.pop()
        if os.path.isfile(init):
            with open(init, encoding="utf-8") as file:
                exec(compile(file.read(), init, "exec"), globals())
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
