"""How each mixer starts from the layer that it replaces. Only conversions read this; no exported model has it."""

from convert.mixers.init.base import Start
from convert.mixers.init.gate_swa import GateSWAStart
from convert.mixers.init.gdn import GDNStart
from convert.mixers.init.hedgehog import LinearStart, Mamba2Start, MambaStart
from convert.mixers.init.kda import KDAStart
from convert.mixers.init.mla import MLAStart

STARTS: dict[str, type[Start]] = {
    "linear": LinearStart,
    "mamba": MambaStart,
    "mamba2": Mamba2Start,
    "gate-swa": GateSWAStart,
    "mla": MLAStart,
    "kda": KDAStart,
    "gdn": GDNStart,
}

__all__ = ["STARTS", "Start"]
