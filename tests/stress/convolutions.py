"""Random convolution calls, right and wrong ones: each is computed right or refused as PyTorch refuses it.

``python tests/stress/convolutions.py [calls] [sanitized calls]``: 20,000 and 2,000 take some minutes.

A call has random shapes (empty ones and wrong ones, too), stride, padding, dilation and groups of every type that a
caller might think of, operands of several dtypes, memory layouts and devices, and a multiplier of any family, a table
or a function in C. ``torch.nn.functional.conv2d`` is called with the same arguments, and then

- where PyTorch computes it, the outputs are the sums of bit-exact products within the bound of float32 additions
  (sums.py), or the call is refused for a reason in DOCUMENTED, which `mbm_cli.ops.conv2d` names;
- where PyTorch refuses it, it is refused, with an exception of the same kind.

On the meta device the shapes are compared; whether a call is right is what PyTorch says on the CPU, for its meta
functions compute shapes for some calls that no device accepts.

The last part is for the C++ kernels. They are compiled once more with AddressSanitizer and UndefinedBehaviorSanitizer,
into a temporary folder, and a second Python, with the sanitizer's library loaded first (LD_PRELOAD), imports this
module in the place of ``mbm_cli._cpu``. PyTorch's memory then comes from the sanitizer's allocator as well, so an
access next to a tensor is seen. Functions in C are compiled with the same options. The first fault ends that Python
with a report.
"""

import importlib.util
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TESTS = Path(__file__).parent.parent
SANITIZED = "MBM_SANITIZED"  # for the second Python: where the sanitized module is

# As CMakeLists.txt has them.
INSTRUCTION_SETS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mbmi2",
    "avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512",
}
OPTIONS = "-std=c++17 -fPIC -fvisibility=hidden -fno-trapping-math -fno-math-errno -ffp-contract=fast"
SANITIZE = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def import_sanitized(path: str) -> None:
    """Have ``mbm_cli._cpu`` be this module; before anything of mbm_cli is imported."""
    specification = importlib.util.spec_from_file_location("mbm_cli._cpu", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    sys.modules["mbm_cli._cpu"] = module


if SANITIZED in os.environ:
    import_sanitized(os.environ[SANITIZED])

sys.path.append(str(TESTS))
from memory_formats import MEMORY_FORMATS  # noqa: E402
from sums import assert_sums_of_products  # noqa: E402
from tables import random_table  # noqa: E402

from mbm_cli.backends import cpu  # noqa: E402
from mbm_cli.multipliers import FAMILIES, Multiplier  # noqa: E402
from mbm_cli.ops import conv2d  # noqa: E402

TABLES = [random_table(bits) for bits in (1, 3, 7, 8)]
SHOWN = 20  # of what is wrong
KINDS = (TypeError, ValueError, RuntimeError)
# Where PyTorch computes a convolution and this project does not: parts of the refusals.
DOCUMENTED = (
    "takes float32",  # other types
    "move them to one device",  # PyTorch's meta device meets any other
    "only the batch may be empty",
    "dilation are at least 1",  # with an empty batch PyTorch does not look
    "to_dense()",
    "is at most 2147483647",  # stride, padding, dilation
)
ODD_NUMBERS = [0, -1, -7, 2**40, 2**62, 2**63, -(2**63), -(2**63) - 1]
ODD_ARGUMENTS = [
    None,
    1.0,
    1.5,
    "1",
    True,
    (True, 1),
    (1, 2.0),
    (1, None),
    ("same", 1),
    (),
    (1, 1, 1),
    [2],
    range(1, 3),
]
ODD_ARGUMENTS += [float("nan"), {}, {1: 2}, [[1, 1]], torch.Size((1, 2))]
ODD_PADDINGS = ["same", "valid", "full", "", "SAME"]
OTHER_DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]
OTHER_DTYPES += [torch.complex64]
NO_TENSORS = [1.0, [1.0, 2.0, 3.0], "tensor", object()]


@dataclass
class Call:
    """One convolution: operands on the CPU, the other arguments by name, and where it is computed."""

    operands: list[Any]
    arguments: dict[str, Any]
    multiplier: Multiplier
    model: Multiplier  # whose products are the multiplier's
    devices: list[str]

    def __str__(self) -> str:
        shapes = [
            f"{tuple(x.shape)} {x.dtype} strides {x.stride()}" if isinstance(x, Tensor) else repr(x)
            for x in self.operands
        ]
        return f"{shapes} {self.arguments} {self.multiplier} on {self.devices}"

    def placed(self) -> list[Any]:
        return [
            x.to(device) if isinstance(x, Tensor) else x for x, device in zip(self.operands, self.devices, strict=True)
        ]


def function_in_c() -> Multiplier:
    return Multiplier.parse(f"c:{TESTS.parent / 'examples' / 'mbm.h'}:mbm")


def random_multiplier(choose: random.Random, in_c: Multiplier) -> tuple[Multiplier, Multiplier]:
    kind = choose.random()
    if kind < 0.1:
        return in_c, Multiplier("mbm")
    if kind < 0.3:
        table = choose.choice(TABLES)
        return table, table
    while True:
        family = choose.choice(list(FAMILIES))
        result_bits = choose.choice([None, None, choose.randint(1, 23)])
        multiplier = Multiplier(family, choose.choice(FAMILIES[family].truncations), result_bits)
        if not multiplier.is_exact:
            return multiplier, multiplier


def random_call(choose: random.Random, in_c: Multiplier) -> Call:
    """A convolution that has an output, and then, half of the time, something in it that is odd."""
    groups, channels, outputs = choose.randint(1, 3), choose.randint(1, 4), choose.choice([1, 2, 3, 4, 5, 9])
    kernel, stride, dilation, padding = (
        [choose.randint(*bounds) for _ in range(2)] for bounds in ((1, 4), (1, 4), (1, 3), (0, 4))
    )
    is_far = choose.random() < 0.03
    if is_far:  # apart, and out
        axis, far = choose.randrange(2), choose.choice([50, 2**20, 2**31 - 1])
        dilation[axis], padding[axis], stride[axis] = far, far, choose.choice([far, max(1, far // 100)])
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    size = [min(n, 40) + choose.choice([0, choose.randint(0, 12)]) for n in least]
    shapes = [
        [choose.choice([0, 1, 1, 2, 3]), groups * channels, *size],
        [groups * outputs, channels, *kernel],
        [groups * outputs],
    ]
    arguments = {
        "stride": either(choose, stride, is_far),
        "padding": either(choose, padding, is_far),
        "dilation": either(choose, dilation, is_far),
        "groups": groups,
    }
    if choose.random() < 0.15:
        arguments["padding"] = choose.choice(["same", "valid"])
    odd = not is_far and choose.random() < 0.5  # with a stride of 1, what is far out has billions of outputs
    if odd:
        for _ in range(choose.choice([1, 1, 2])):
            choose.choice([odd_shape, odd_argument])(choose, shapes, arguments)
    operands = [random_operand(choose, shape, odd) for shape in shapes]
    if choose.random() < 0.4:
        operands[2] = None
    if operands[0] is not None and choose.random() < 0.15 and operands[0].dim() == 4 and operands[0].shape[0]:
        operands[0] = operands[0][0]
    devices = [choose.choice(["cpu"] * 9 + ["meta"])] * 3
    if odd and choose.random() < 0.2:
        odd_operand(choose, operands, devices)
    call = {name: value for name, value in arguments.items() if is_far or choose.random() < 0.9 or name == "groups"}
    return Call(operands, call, *random_multiplier(choose, in_c), devices)


def either(choose: random.Random, pair: list[int], both: bool) -> Any:
    """Two numbers, or the first of them for both, in one of the forms that there are."""
    return choose.choice([pair, tuple(pair)] if both else [pair, tuple(pair), pair[0], [pair[0]]])


def random_operand(choose: random.Random, shape: list[int], odd: bool) -> Tensor:
    generator = torch.Generator().manual_seed(choose.randrange(1 << 31))
    x = torch.randn(shape, generator=generator)
    kind = choose.random()
    if kind < 0.2:
        x = x.relu()
    elif kind < 0.4:
        x = x * torch.exp2(torch.randint(-90, 21, x.shape, generator=generator))
    elif kind < 0.5:
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0**-140, 2.0**-126, 2.0**100, -0.0])
        chosen = special[torch.randint(len(special), x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, chosen, x)
    if x.dim() == 1 and choose.random() < 0.3:
        return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
    if x.dim() == 4 and x.numel():
        return MEMORY_FORMATS[choose.choice(list(MEMORY_FORMATS))](x)
    return x


def odd_shape(choose: random.Random, shapes: list[list[int]], arguments: dict[str, Any]) -> None:
    shape = choose.choice(shapes)
    change = choose.randrange(4)
    if change == 0 and shape:
        shape[choose.randrange(len(shape))] = 0
    elif change == 1 and shape:
        shape[choose.randrange(len(shape))] += choose.choice([-1, 1, 2]) if min(shape) else 1
    elif change == 2:
        shape.insert(0, choose.choice([0, 1, 2]))
    elif shape:
        del shape[choose.randrange(len(shape))]


def odd_argument(choose: random.Random, shapes: list[list[int]], arguments: dict[str, Any]) -> None:
    name = choose.choice(list(arguments))
    odd = choose.choice([*ODD_NUMBERS, *ODD_ARGUMENTS])
    if name == "padding":
        odd = choose.choice([odd, *ODD_PADDINGS])
    if type(odd) is int and name != "groups":  # of truth values PyTorch refuses the first of a pair alone
        odd = choose.choice([odd, (1, odd), [odd, odd]])
    if name == "groups" and choose.random() < 0.5:
        odd = choose.randint(1, 5)
    arguments[name] = odd


def odd_operand(choose: random.Random, operands: list[Any], devices: list[str]) -> None:
    which, change = choose.randrange(3), choose.randrange(5)
    if change == 0:
        operands[which] = choose.choice(NO_TENSORS)
    elif change == 1:
        devices[which] = choose.choice(["cpu", "meta"])
    elif change == 2 and isinstance(operands[which], Tensor):
        operands[which] = operands[which].to_sparse()
    else:
        dtype = choose.choice(OTHER_DTYPES)
        chosen = range(3) if change == 3 else [which]
        for i in chosen:
            if isinstance(operands[i], Tensor):
                operands[i] = operands[i].to(dtype)


def outcome(function: Any, *arguments: Any, **named: Any) -> Tensor | Exception:
    try:
        with warnings.catch_warnings(action="ignore"):  # PyTorch copies the input for some paddings and says so
            return function(*arguments, **named)
    except Exception as error:
        return error


def kind(error: Exception) -> str:
    return next((kind.__name__ for kind in KINDS if isinstance(error, kind)), type(error).__name__)


def check(call: Call, threads: int) -> str:
    """What became of the call, in a word or two; AssertionError says what is wrong with that."""
    torch.set_num_threads(1)
    # PyTorch 2.14 itself crashes with a weight of shape (9, 2, 4, 1) and strides (8, 1, 2, 2) in three groups.
    operands = [x.contiguous() if isinstance(x, Tensor) and x.layout == torch.strided else x for x in call.operands]
    theirs = outcome(F.conv2d, *operands, **call.arguments)
    torch.set_num_threads(threads)
    ours = outcome(conv2d, *call.placed(), **call.arguments, multiplier=call.multiplier)
    if isinstance(ours, Exception):
        if isinstance(theirs, Exception):
            # For more than 64 bits PyTorch has a ValueError or, in a pair, a TypeError.
            kinds = {kind(ours), kind(theirs)}
            is_overflow = "64 bits" in str(ours) or "Overflow when" in str(theirs)
            same = len(kinds) == 1 or (is_overflow and kinds == {"TypeError", "ValueError"})
            # PyTorch looks for the first image of an empty batch before it looks at the other arguments.
            same |= isinstance(theirs, IndexError) and kind(ours) == "RuntimeError"
            assert same, f"{ours!r:.200}, but PyTorch has {theirs!r:.200}"
            return f"refused as PyTorch does, {kind(ours)}"
        reason = next((reason for reason in DOCUMENTED if reason in str(ours)), None)
        assert reason, f"{ours!r:.300}, but PyTorch computes it"
        return f"refused, {reason}"
    if "can't allocate memory" in str(theirs) and ours.device.type == "meta":
        return "computed on meta, too large for PyTorch on the CPU"
    assert not isinstance(theirs, Exception), f"computed, but PyTorch has {theirs!r:.200}"
    assert ours.shape == theirs.shape, f"the shape is {ours.shape}, but PyTorch's is {theirs.shape}"
    if ours.device.type == "meta":
        return "shape right on meta"
    check_values(call, ours)
    return "sums right"


def check_values(call: Call, output: Tensor) -> None:
    input, weight, bias = call.operands
    stride, padding, dilation = (pair(call.arguments.get(*default)) for default in DEFAULTS)
    if input.dim() == 3:
        input, output = input.unsqueeze(0), output.unsqueeze(0)
    if padding == ["same", "same"]:
        total = [dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
        padding = [n // 2 for n in total]
    elif padding == ["valid", "valid"]:
        padding = [0, 0]
    if output.numel():
        groups = call.arguments["groups"]
        assert_sums_of_products(output, input, weight, bias, stride, padding, dilation, groups, call.model)


DEFAULTS = (("stride", 1), ("padding", 0), ("dilation", 1))


def pair(value: Any) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * 2 if len(values) == 1 else values


def run(calls: int, seed: int = 0) -> list[str]:
    """Check so many calls and tell what became of them; gives what was wrong."""
    choose, in_c, wrong, outcomes = random.Random(seed), function_in_c(), [], Counter()
    started = time.perf_counter()
    for number in range(1, calls + 1):
        call = random_call(choose, in_c)
        cpu._cpu.use_instruction_set(choose.choice(cpu._cpu.instruction_sets()))
        try:
            outcomes[check(call, choose.choice([1, 2]))] += 1
        except AssertionError as error:
            outcomes["WRONG"] += 1
            wrong.append(f"call {number}: {call}: {error}")
            if len(wrong) <= SHOWN:
                print(wrong[-1], flush=True)
    print(f"{calls:,} calls in {time.perf_counter() - started:.0f} s:", flush=True)
    for what, count in outcomes.most_common():
        print(f"  {count:6,} {what}", flush=True)
    return wrong


# Under the sanitizers


def build_sanitized(folder: Path) -> str:
    """Compile the module into the folder; gives the libraries that have to be loaded first.

    Raises:
        RuntimeError: there is no g++, no source of nanobind, or no library of the sanitizers.
    """
    try:
        import nanobind
    except ImportError:
        raise RuntimeError("nanobind is not installed: pip install nanobind") from None
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("there is no g++")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):  # the last one, because ASan looks for its __cxa_throw
        asked = [compiler, f"-print-file-name={name}"]
        libraries.append(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        if not Path(libraries[-1]).is_absolute():
            raise RuntimeError(f"g++ has no {name}: install the sanitizers' libraries")
    base, kernels = Path(nanobind.__file__).parent, TESTS.parent / "kernels"
    includes = [
        f"-I{path}" for path in (sysconfig.get_path("include"), base / "include", base / "ext/robin_map/include")
    ]
    sources = [("nanobind", base / "src" / "nb_combined.cpp", "-O1 -DNB_COMPACT_ASSERTIONS")]
    sources += [("module", kernels / "conv2d.cpp", f"{SANITIZE} -fopenmp")]
    sources += [
        (name, kernels / "conv2d_simd.cpp", f"{SANITIZE} -DMBM_ISA={name} {flags}")
        for name, flags in INSTRUCTION_SETS.items()
    ]
    made = [str(folder / f"{name}.o") for name, _, _ in sources]
    commands = [
        [compiler, *OPTIONS.split(), *flags.split(), *includes, "-c", str(source), "-o", to]
        for (_, source, flags), to in zip(sources, made, strict=True)
    ]
    running = [subprocess.Popen(command) for command in commands]
    if any(process.wait() for process in running):
        raise RuntimeError("the kernels do not compile with the sanitizers")
    subprocess.run(
        [compiler, "-shared", *SANITIZE.split(), "-fopenmp", *made, "-o", str(folder / "_cpu.so")], check=True
    )
    return " ".join(libraries)


def run_sanitized(calls: int) -> list[str]:
    """So many calls in a Python of its own, with the sanitized kernels; gives what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        try:
            libraries = build_sanitized(Path(folder))
        except RuntimeError as error:
            print(f"sanitizers: skipped, {error}", flush=True)
            return []
        print(f"compiled with AddressSanitizer and UBSan in {time.perf_counter() - started:.0f} s", flush=True)
        environment = {
            **os.environ,
            SANITIZED: str(Path(folder, "_cpu.so")),
            "LD_PRELOAD": libraries,
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks; PyTorch refuses sizes itself
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "XDG_CACHE_HOME": folder,  # functions in C are not mixed up with those compiled without
        }
        code = subprocess.run([sys.executable, __file__, str(calls)], env=environment, check=False).returncode
    return [f"the sanitized run ended with {code}"] if code else []


def main(calls: int = 20_000, sanitized: int = 2_000) -> int:
    if SANITIZED in os.environ:
        cpu._OPTIONS = f"{cpu._OPTIONS} {SANITIZE}"
        print(f"sanitized: {cpu._cpu.__file__}", flush=True)
        return int(bool(run(calls, seed=1)))
    wrong = run(calls) + (run_sanitized(sanitized) if sanitized else [])
    print(f"convolutions: {calls:,} calls and {sanitized:,} under sanitizers, {len(wrong)} wrong", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
