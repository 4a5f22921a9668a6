"""The reference backend of the integer operators: table entries gathered and added, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.integers import IntegerOperators


def run(
    geometry: Geometry, input: Tensor, weight: Tensor, output: Tensor, table: Tensor, padding_code: int, path: str
) -> None:
    """Add up one kernel element of one channel at a time; padding takes part with its code."""
    g = geometry
    shape, strides = (g.batch, g.groups, g.channels, *g.size), g.input_strides
    codes = input.as_strided(shape, strides).long() & 255
    vertical, horizontal = g.padding
    codes = F.pad(codes, (horizontal, horizontal, vertical, vertical), value=padding_code & 255)
    weights = weight.reshape(g.groups, g.out_channels, g.channels, *g.kernel).long() & 255
    sums = output.view(g.batch, g.groups, g.out_channels, *g.out_size).zero_()
    spans = [(g.out_size[i] - 1) * g.stride[i] + 1 for i in range(2)]
    for channel in range(g.channels):
        for i in range(g.kernel[0]):
            for j in range(g.kernel[1]):
                top, left = i * g.dilation[0], j * g.dilation[1]
                window = codes[:, :, channel, top : top + spans[0] : g.stride[0], left : left + spans[1] : g.stride[1]]
                sums += table[window[:, :, None], weights[:, :, channel, i, j][None, :, :, None, None]]


OPERATORS = IntegerOperators("default", run)
