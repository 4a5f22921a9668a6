"""`mbm doctor`: is everything there that training needs, and does every backend multiply as the model says?"""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product

import torch
from torch import Tensor

from mbm_cli import data
from mbm_cli.backends import cpu, cuda
from mbm_cli.environment import cpu_name
from mbm_cli.multipliers import FAMILIES, FRACTION_BITS, Multiplier, reference_product
from mbm_cli.ops import conv2d, multiply

RANDOM_PAIRS = 1 << 20
# t = 0, whose sums need rounding, a published format, and t = 17, where mbm has a constant of its own.
CHECKED = [
    str(Multiplier(name, truncate, result_bits))
    for name, family in FAMILIES.items()
    for truncate, result_bits in ((0, None), (8, None), (16, 7), (17, None))
    if truncate in family.truncations
]


@dataclass(frozen=True)
class Check:
    """One thing looked at; ``problem`` is empty where it is as it should be, else it says what to do."""

    name: str
    found: str
    problem: str = ""


def doctor(seed: int = 0, report: Callable[[Check], None] = lambda check: None) -> dict[str, object]:
    """Look at everything; ``report`` gets each check as soon as it is done.

    Returns:
        ``checks``, each with ``name``, ``found`` and ``problem``; ``passed`` says whether none has a problem.
    """
    checks = []
    for check in _checks(seed):
        checks.append(check)
        report(check)
    return {"passed": not any(check.problem for check in checks), "checks": [asdict(check) for check in checks]}


def _checks(seed: int) -> Iterator[Check]:
    yield Check("python", platform.python_version())
    for package in ("mbm-cli", "torch", "torchvision"):
        yield Check(package, version(package))
    yield Check("cpu", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    yield Check("cpu kernels", f"{cpu.instruction_set()} (PyTorch: {torch.backends.cpu.get_cpu_capability()})")
    devices = ["cpu"]
    if torch.cuda.is_available():
        cupy = _cupy()
        yield from _cuda(cupy)
        if not cupy.problem:
            devices.append("cuda")
    else:
        yield Check("cuda", "no CUDA device, training runs on the CPU")
    yield _mnist()
    for device in devices:
        yield self_check(torch.device(device), seed)


def _cuda(cupy: Check) -> Iterator[Check]:
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        yield Check(f"cuda:{index}", f"{p.name}, compute capability {p.major}.{p.minor}, {memory}")
    yield Check("cuda", f"PyTorch built for {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    yield cupy


def _cupy() -> Check:
    try:
        found = cuda.import_cupy()
    except cuda.CudaError as error:
        return Check("cupy", "not usable", str(error))
    driver = found.cuda.runtime.driverGetVersion()
    cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    return Check("cupy", f"{found.__version__}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, cache {cache}")


def _mnist() -> Check:
    folder = data.data_root(None) / "MNIST" / "raw"
    wrong = [name for name in data.MD5 if not data.is_whole(folder / name)]
    if wrong:
        return Check("mnist", f"missing or damaged in {folder}: {', '.join(wrong)}", "run: mbm data fetch")
    return Check("mnist", f"complete and verified in {folder}")


def self_check(device: torch.device, seed: int) -> Check:
    """Every product of a backend against the model, bit for bit: operands with 7 fraction bits, random bit patterns."""
    name, products = f"products on {device.type}", 0
    for short_form, pairs in product(CHECKED, (_seven_bit_pairs(device), _random_pairs(device, seed))):
        for what, found, wanted in _answers(short_form, *pairs):
            differs = _bits(found) != _bits(wanted)
            if what == "conv2d":
                differs &= ~(found.isnan() & wanted.isnan())  # which NaN a sum is, its device decides
            if differs.any():
                i = int(differs.nonzero()[0])
                a, b, was, should = (_hex(x[i]) for x in (*pairs, found, wanted))
                wrong = f"{what} with {short_form}: {a} x {b} is {was}, not {should} ({int(differs.sum()):,} differ)"
                return Check(name, wrong, "the kernels are wrong on this machine: do not train with them, report it")
            products += len(found)
    return Check(name, f"{products:,} products of {len(CHECKED)} multipliers equal the model, bit for bit")


def _answers(short_form: str, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Who computes the products, what they are there, and what they should be."""
    multiplier = Multiplier.parse(short_form)
    expected = reference_product(a, b, multiplier)
    yield "multiply", multiply(a, b, short_form), expected
    if not multiplier.is_exact:  # that convolution is PyTorch's own
        # One product a sum: convolutions have kernels of their own, with another form of the product.
        sums = conv2d(a.view(1, -1, 1, 1), b.view(-1, 1, 1, 1), groups=len(a), multiplier=short_form)
        yield "conv2d", sums.flatten(), 0.0 + expected


def _seven_bit_pairs(device: torch.device) -> tuple[Tensor, Tensor]:
    fractions = torch.arange(128, dtype=torch.int32, device=device) << (FRACTION_BITS - 7)
    ones = (fractions | 0x3F800000).view(torch.float32)
    a, b = torch.meshgrid(ones, -ones, indexing="ij")
    return a.flatten(), b.flatten()


def _random_pairs(device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (2, RANDOM_PAIRS // len(CHECKED)), generator=generator)
    a, b = bits.to(torch.int32).view(torch.float32).to(device)
    return a, b


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _hex(x: Tensor) -> str:
    return f"0x{int(_bits(x.reshape(1))) & 0xFFFFFFFF:08X}"
