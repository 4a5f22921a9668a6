"""`mbm doctor`: check the installation, and that every backend multiplies as the model does."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product

import torch
from torch import Tensor

from mbm_cli.backends import cpu, cuda_programs
from mbm_cli.config import DataConfig
from mbm_cli.data import DATASETS
from mbm_cli.device import cpu_name
from mbm_cli.multipliers.content import resolve
from mbm_cli.multipliers.float32 import FAMILIES, FRACTION_BITS, reference_product
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.ops import conv2d, integer_linear, multiply

RANDOM_PAIRS = 1 << 20
# t = 0, whose sums need rounding, a published format, and t = 17, where mbm has a constant of its own.
CHECKED = [
    str(Multiplier(name, truncate, result_bits))
    for name, family in FAMILIES.items()
    for truncate, result_bits in ((0, None), (8, None), (16, 7), (17, None))
    if truncate in family.truncations
]
CHECKED_INTEGERS = ("mbm-int8", "drum-uint8-k4")
PATHS = {"cpu": ("terms", "lookup"), "cuda": ("terms", "rows", "direct")}  # ways to sum integer products


@dataclass(frozen=True)
class Check:
    """One thing checked; ``problem`` says what to do, and is empty where all is well."""

    name: str
    found: str
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and whether none has a problem."""

    passed: bool
    checks: list[Check]


def doctor(
    seed: int = 0, threads: int | None = None, report: Callable[[Check], None] = lambda check: None
) -> Diagnosis:
    """Check everything; call ``report`` with each check as soon as it is done."""
    if threads is not None:
        torch.set_num_threads(threads)
    checks = []
    for check in _checks(seed):
        checks.append(check)
        report(check)
    return Diagnosis(not any(check.problem for check in checks), checks)


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
    name = DataConfig().dataset
    folder, damaged = DATASETS[name].damage(None)
    if damaged and not folder.exists():
        yield Check(name, "not fetched", f"run: mbm data fetch {name}")
    elif damaged:
        yield Check(name, f"missing or damaged in {folder}: {', '.join(damaged)}", f"run: mbm data fetch {name}")
    else:
        yield Check(name, f"complete and verified in {folder}")
    if "cuda" in devices:
        _compile()
    for device in devices:
        yield self_check(torch.device(device), seed)
        yield integer_check(torch.device(device))


def _cuda(cupy: Check) -> Iterator[Check]:
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        yield Check(f"cuda:{index}", f"{p.name}, compute capability {p.major}.{p.minor}, {memory}")
    yield Check("cuda", f"PyTorch built for {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    yield cupy


def _cupy() -> Check:
    try:
        found = cuda_programs.import_cupy()
    except cuda_programs.CudaError as error:
        return Check("cupy", "not usable", str(error))
    driver = found.cuda.runtime.driverGetVersion()
    cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    return Check("cupy", f"{found.__version__}, driver for CUDA {driver // 1000}.{driver % 1000 // 10}, cache {cache}")


def _compile() -> None:
    """Compile the kernels of the checks of floats, several at once."""
    one = torch.ones(1, device="cuda")
    with cuda_programs.noted() as kernels:
        for short_form in CHECKED:
            list(_answers(short_form, one, one))
    cuda_programs.load(kernels, torch.cuda.current_device())


def self_check(device: torch.device, seed: int) -> Check:
    """Compare a backend's products with the model's, bit for bit: all 7-bit operands, and random bit patterns."""
    name, products = f"products on {device.type}", 0
    for short_form, pairs in product(CHECKED, (_seven_bit_pairs(device), _random_pairs(device, seed))):
        for what, found, wanted in _answers(short_form, *pairs):
            differs = _bits(found) != _bits(wanted)
            if what == "conv2d":
                differs &= ~(found.isnan() & wanted.isnan())  # the device decides which NaN a sum is
            if differs.any():
                i = int(differs.nonzero()[0])
                a, b, was, should = (_hex(x[i]) for x in (*pairs, found, wanted))
                wrong = f"{what} with {short_form}: {a} x {b} is {was}, not {should} ({int(differs.sum()):,} differ)"
                return Check(name, wrong, "the kernels are wrong on this machine: do not train with them, report it")
            products += len(found)
    return Check(name, f"{products:,} products of {len(CHECKED)} multipliers equal the model, bit for bit")


def integer_check(device: torch.device) -> Check:
    """Compare all products of integer multipliers, by each way to sum them, with their tables."""
    name, products = f"integer products on {device.type}", 0
    for short_form, path in product(CHECKED_INTEGERS, PATHS[device.type]):
        if (
            path == "terms"
            and device.type == "cuda"
            and not cuda_programs.has_matrix_units(torch.cuda.current_device())
        ):
            continue
        table = resolve(short_form).content
        codes = torch.arange(256, dtype=torch.uint8).view(torch.int8 if table.operands.signed else torch.uint8)
        sums = integer_linear(codes[:, None].to(device), codes[:, None].to(device), short_form, path)
        wrong = int((sums.cpu() != table.tensor()).sum())
        if wrong:
            found = f"{short_form} by {path}: {wrong:,} of {sums.numel():,} products differ from the table"
            return Check(name, found, "the kernels are wrong on this machine: do not train with them, report it")
        products += sums.numel()
    return Check(name, f"{products:,} products of {len(CHECKED_INTEGERS)} multipliers equal their tables")


def _answers(short_form: str, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield what computes the products, its products, and the model's."""
    multiplier = Multiplier.parse(short_form)
    expected = reference_product(a, b, multiplier)
    yield "multiply", multiply(a, b, short_form), expected
    if not multiplier.is_exact:  # exact convolutions are PyTorch's own
        # Sums of one product: the kernels of convolutions have another form of the product.
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
