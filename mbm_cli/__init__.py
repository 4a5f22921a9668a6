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
    from mbm_cli.ops import integer_conv2d as integer_conv2d
    from mbm_cli.ops import integer_linear as integer_linear
    from mbm_cli.ops import linear as linear
    from mbm_cli.ops import multiply as multiply
    from mbm_cli.quantize import Quantization as Quantization
    from mbm_cli.quantize import calibrate as calibrate

__version__ = version("mbm-cli")
_HOMES = {
    "ApproxConv2d": "nn",
    "ApproxLinear": "nn",
    "Multiplier": "multipliers.names",
    "Quantization": "quantize",
    "calibrate": "quantize",
    "conv2d": "ops",
    "convert": "nn",
    "integer_conv2d": "ops",
    "integer_linear": "ops",
    "linear": "ops",
    "multiply": "ops",
    "resolve": "multipliers.content",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Resolved at first use: importing PyTorch takes seconds, which `mbm --help` does not need.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
