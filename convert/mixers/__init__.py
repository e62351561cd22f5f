"""Token mixers that replace attention.

A new one is a file and a line here, and its start is one in mixers/init; the promises of tests/mixers/test_promises.py
come with it. An exported model has this table with its own mixers alone."""

from convert.mixers.base import Context, Mixer
from convert.mixers.gate_swa import GateSWA
from convert.mixers.gdn import GDN
from convert.mixers.kda import KDA
from convert.mixers.linear import LinearAttention
from convert.mixers.mamba import Mamba
from convert.mixers.mamba2 import Mamba2
from convert.mixers.mla import MLA

MIXERS: dict[str, type[Mixer]] = {
    "linear": LinearAttention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "gate-swa": GateSWA,
    "mla": MLA,
    "kda": KDA,
    "gdn": GDN,
}

__all__ = ["GDN", "KDA", "MIXERS", "MLA", "Context", "GateSWA", "LinearAttention", "Mamba", "Mamba2", "Mixer"]
