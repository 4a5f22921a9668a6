"""The shapes of outputs, and the checks that arguments fit together."""

from torch import Tensor

_LARGEST = 2**31 - 1  # stride, padding, dilation: sums and products of them fit 64 bits in the kernels


def conv2d_output_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> list[int]:
    """Return the output's shape, (N, O, H', W'). Every backend calls this before it touches memory.

    Raises:
        RuntimeError: where ``torch.nn.functional.conv2d`` raises one.
    """
    if input.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(
            f"the input has 3 or 4 dimensions and the weight 4, not {list(input.shape)} and {list(weight.shape)}"
        )
    out_channels, group_channels, *kernel = weight.shape
    if groups < 1 or out_channels % groups != 0:
        raise RuntimeError(f"{out_channels} output channels cannot be divided into {groups} groups")
    if input.shape[1] != group_channels * groups:
        raise RuntimeError(
            f"the input has {input.shape[1]} channels, but the weight {list(weight.shape)} with groups={groups} "
            f"takes {group_channels * groups}"
        )
    if bias is not None and list(bias.shape) != [out_channels]:
        raise RuntimeError(f"the bias has shape {list(bias.shape)}, but there are {out_channels} output channels")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise RuntimeError(
            f"stride and dilation are at least 1 and padding at least 0, not {stride}, {dilation}, {padding}"
        )
    if max(*stride, *padding, *dilation) > _LARGEST:
        raise RuntimeError(
            f"each of stride, padding and dilation is at most {_LARGEST}, not {stride}, {padding}, {dilation}"
        )
    if 0 in weight.shape or 0 in input.shape[1:]:
        raise RuntimeError(f"only the batch may be empty, not {list(input.shape)} or {list(weight.shape)}")
    size = []
    for i in range(2):
        padded, extent = input.shape[2 + i] + 2 * padding[i], dilation[i] * (kernel[i] - 1) + 1
        if extent > padded:
            raise RuntimeError(
                f"the kernel (extent {extent} with its dilation) is larger than the padded input ({padded})"
            )
        size.append((padded - extent) // stride[i] + 1)
    return [input.shape[0], out_channels, *size]


def linear_output_shape(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[int]:
    """Return the output's shape, (N, O), for an input (N, K) and a weight (O, K).

    Raises:
        RuntimeError: where ``torch.nn.functional.linear`` raises one.
    """
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1]:
        raise RuntimeError(f"an input {list(input.shape)} does not fit a weight {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [weight.shape[0]]:
        raise RuntimeError(f"the bias has shape {list(bias.shape)}, but there are {weight.shape[0]} outputs")
    return [input.shape[0], weight.shape[0]]
