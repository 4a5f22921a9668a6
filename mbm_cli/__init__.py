"""mbm: train neural networks with approximate multiplications, bit for bit as a hardware multiplier computes them."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbm_cli.multipliers import Multiplier as Multiplier
    from mbm_cli.nn import MBMConv2d as MBMConv2d
    from mbm_cli.nn import convert as convert
    from mbm_cli.ops import multiply as multiply

__version__ = version("mbm-cli")
__all__ = ["MBMConv2d", "Multiplier", "convert", "multiply"]

_HOMES = {"MBMConv2d": "nn", "Multiplier": "multipliers", "convert": "nn", "multiply": "ops"}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved at first use: importing PyTorch takes seconds, which `mbm --help` need not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
