"""mbm: train neural networks with approximate multiplications, bit for bit as a hardware multiplier computes them."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbm_cli.multipliers.content import resolve as resolve
    from mbm_cli.multipliers.names import Multiplier as Multiplier
    from mbm_cli.nn import ApproxConv2d as ApproxConv2d
    from mbm_cli.nn import ApproxLinear as ApproxLinear
    from mbm_cli.nn import convert as convert
    from mbm_cli.ops import conv2d as conv2d
    from mbm_cli.ops import linear as linear
    from mbm_cli.ops import multiply as multiply

__version__ = version("mbm-cli")
__all__ = ["ApproxConv2d", "ApproxLinear", "Multiplier", "conv2d", "convert", "linear", "multiply", "resolve"]

_HOMES = {
    "ApproxConv2d": "nn",
    "ApproxLinear": "nn",
    "Multiplier": "multipliers.names",
    "conv2d": "ops",
    "convert": "nn",
    "linear": "ops",
    "multiply": "ops",
    "resolve": "multipliers.content",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved at first use: importing PyTorch takes seconds, which `mbm --help` does not need.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
