"""Files of integer multipliers: each format, what is wrong with files, and what the commands say of them."""

import time
from pathlib import Path

import numpy as np
import pytest
from commands import mbm

from mbm_cli import resolve
from mbm_cli.multipliers.code import compiler, integers
from mbm_cli.multipliers.integer import IntegerTable, Operands

SIGNED, UNSIGNED = Operands(8, True), Operands(8, False)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(name: str) -> np.ndarray:
    table = resolve(name).content
    assert isinstance(table, IntegerTable)
    return table.entries


def write(file: str, text: str) -> str:
    Path(file).write_text(text)
    return file


def lopsided(operands: Operands) -> np.ndarray:
    """Return a table near the products that shows exchanged operands: f(a, b) = a b + (a & 1), by bit patterns."""
    numbers = operands.numbers()
    return np.outer(numbers, numbers) + (numbers[:, None] & 1)


def by_numbers(table: np.ndarray) -> np.ndarray:
    """Reorder a signed table from -2^(n-1) to 2^(n-1) - 1, one row after the other."""
    order = sorted(range(len(table)), key=lambda code: (code < len(table) // 2, code))
    return table[order][:, order]


def random_table(operands: Operands) -> np.ndarray:
    size = 1 << operands.bits
    return np.random.default_rng(0).integers(-100, 100, (size, size))


def defective() -> np.ndarray:
    """Return (a & ~1) (b & ~1) as circulating headers of circuit 1L2H have it: magnitudes of negative pairs wrapped."""
    table = np.empty((256, 256), np.int64)
    for a in range(-128, 128):
        for b in range(-128, 128):
            x, y = (-128 if one == -128 else abs(one) if a < 0 and b < 0 else one for one in (a, b))
            table[a, b] = (x & ~1) * (y & ~1)
    return table


# Functions in C

PUBLISHED = """/***
* This code is a part of a library; it has a function(s): int8_t f(int8_t A, int8_t B) {
***/
// MAE% = 0.081 %
// PDK45_PWR = 0.301 mW
// PDK45_AREA = 558.9 um2
// PDK45_DELAY = 1.36 ns
#include <stdint.h>
#include <stdlib.h>
#define ONE 1
"""
BODY = "{ return A * B + (A & ONE); }"


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("int8:m.c", f"int16_t f(int8_t A, int8_t B) {BODY}"),
        ("int8:m.c", f"int16_t f(const int8_t B, const int8_t A)\n{BODY}"),
        ("int8:m.c", "uint16_t f(uint8_t A, uint8_t B) { return (int8_t)A * (int8_t)B + (A & 1); }"),
        ("int8:m.c", "int f(unsigned char A, unsigned char B) { return (uint16_t)((int8_t)A * (int8_t)B + (A & 1)); }"),
        ("int8:m.h", f"static inline int64_t f(int32_t A, int32_t B) {BODY}"),
        ("int8:m.c", "short int f(signed char x, long long y) { return x * y + (x & 1); }"),
        ("uint8:m.c", f"uint64_t f(const uint64_t B,const uint64_t A)\n{BODY}"),
        ("uint8:m.c", "int16_t f(uint8_t A, uint8_t B) { return A * B + (A & 1); }"),
        ("int4:m.c", f"int8_t f(int8_t A, int8_t B) {BODY}"),
        (
            "int4:m.c",
            "uint64_t f(uint64_t B, uint64_t A) {\n"
            "  if (A > 15 || B > 15) abort();\n"
            "  return (((A ^ 8) - 8) * ((B ^ 8) - 8) + (A & 1)) & 255; }",
        ),
        ("uint3:m.c", f"unsigned f(unsigned A, unsigned B) {BODY}"),
        ("uint7:m.c", f"int16_t f(int8_t A, int8_t B) {BODY}"),
    ],
)
def test_functions_in_c_are_tabulated(name, function):
    write(name.partition(":")[2], PUBLISHED + function)
    found = resolve(name).content
    assert np.array_equal(found.entries, lopsided(found.operands))
    assert found.costs == {"process": "PDK45", "power": "0.301 mW", "area": "558.9 um2", "delay": "1.36 ns"}


def test_function_is_the_only_one_that_fits_or_named():
    helpers = "static int cut(int x) { while (x > 99) { x--; } if (x) { return x; } return 0; }\n"
    write("m.c", f"{helpers}int f(int A, int B) {{ return A * B; }}\nint many(int a, int b, int c) {{ return a; }}\n")
    assert read("int4:m.c")[7, 7] == 49
    write("m.c", "int f(int A, int B) { return A * B; }\nint g(int A, int B) { return A + B; }\n")
    assert (read("int4:m.c:f")[7, 7], read("int4:m.c:g")[7, 7]) == (49, 14)


def test_programs_are_read_for_their_function():
    write("m.c", "int f(int A, int B) { return A * B; }\nint main(void) { return f(1, 2); }\n")
    assert read("int4:m.c")[7, 7] == 49


def test_functions_include_files_of_their_folder():
    Path("other").mkdir()
    write("other/cut.h", "#define CUT(x) ((x) & ~1)\n")
    write("other/m.c", '#include "cut.h"\n#include <math.h>\nint f(int A, int B) { return CUT(A) * B + floor(0.5); }')
    assert read("int8:other/m.c")[3, 5] == 10


def test_function_wins_over_the_array_that_it_reads():
    words = ",".join(str(a * b) for a in range(-2, 2) for b in range(-2, 2))
    write("m.c", f"const int lut[16] = {{{words}}};\nint f(int A, int B) {{ return 1 + lut[4 * (A + 2) + B + 2]; }}")
    assert read("int2:m.c").tolist() == [[1, 1, 1, 1], [1, 2, -1, 0], [1, -1, 5, 3], [1, 0, 3, 2]]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("int f(int A, int B)\n{\n  return x; }", "int8:m.c", r"m\.c:f does not compile: line 3: .*x"),
        ("int f(int A, int B)\n{ return h(A); }", "int8:m.c", "f does not compile: (undefined reference|line 2)"),
        ("int f(int A, int B) { return A / B; }", "int8:m.c", r"m\.c:f crashes: "),
        (
            "#include <stdlib.h>\nint f(int A, int B) { exit(0); }",
            "int8:m.c",
            r"m\.c:f ends its process \(exit code 0\)",
        ),
        ("int f(int A, int B) { return 1; } int g(int a, int b) { return 1; }", "int8:m.c", "several .* f, g, m.c:f"),
        (
            "float f(float a, float b) { return a; }",
            "int8:m.c",
            r"no function of two .*float f\(float, float\)",
        ),
        ("float f(float a, float b) { return a; }", "int8:m.c:f", r"float f\(float, float\) is not a function of two"),
        ("int f(int a, int *b) { return a; }", "int8:m.c:f", r"int f\(int, int \*\) is not a function of two integers"),
        ("int f(int a) { return a; }", "int8:m.c", r"but int f\(int\): write int16_t f\(int8_t A, int8_t B\)"),
        ("int f(int a, int b) { return a; }", "int8:m.c:g", r"no definition of a function g \(found: f\)"),
        ("", "int8:m.c", r"m\.c has no function of two integers and no array: write int16_t f"),
        (
            "int16_t f(int8_t A, int8_t B) { return 1; }",
            "uint8:m.c",
            "int8_t, which does not have all numbers",
        ),
        ("long long f(int A, int B) { return 1LL << 40; }", "int8:m.c", "1099511627776 has more than 32 bits"),
        ("int f(int A, int B) { return A; }", "int8:m.c@sorted", "a function has no order, so leave @sorted away"),
    ],
)
def test_wrong_functions_in_c_are_rejected(text, name, message):
    write("m.c", text)
    refused(name, message)


def refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["int8:hang.c", "int8:hang.py:f"])
def test_hanging_functions_are_ended(name, monkeypatch):
    monkeypatch.setattr(integers, "SECONDS", 2.0)
    write("hang.c", "int f(int A, int B) { volatile int x = 1; while (x) {} return 0; }")
    write("hang.py", "def f(a, b):\n    while True:\n        pass\n")
    start = time.monotonic()
    refused(name, "f does not compute all its products within 2 s")
    assert time.monotonic() - start < 10


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    write("m.c", "int f(int A, int B) { return A; }")
    refused("int8:m.c", r"needs a C compiler on the CPU: install one \(gcc or clang\), or name it in CC")


# Functions in Python


def test_functions_in_python_are_tabulated():
    write("m.py", "def f(a, b):\n    a *= b\n    return a - (a & 1)\ndef g(a, b): return (a * b).astype('uint16')\n")
    numbers = np.arange(-8, 8)
    exact = np.roll(np.outer(numbers, numbers), (8, 8), (0, 1))
    assert np.array_equal(read("int4:m.py:f"), exact - (exact & 1))
    assert np.array_equal(read("int4:m.py:g"), exact)
    assert np.array_equal(read("uint8:m.py:g"), np.outer(np.arange(256), np.arange(256)))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return a * 0.5", r"m\.py:f returns float64 \(65536,\) for two int64 \(65536,\), not their products"),
        ("return 1", r"m\.py:f returns int64 \(\)"),
        ("return a if a < b else b", r"m\.py:f raises ValueError: The truth value"),
        ("raise SystemExit(3)", r"m\.py:f raises SystemExit: 3"),
        ("import os; os._exit(3)", r"m\.py:f ends its process \(exit code 3\)"),
        ("import os; os.abort()", r"m\.py:f crashes: "),
        ("return a << 40", "has more than 32 bits"),
        ("return 1 +", r"m\.py cannot be run: SyntaxError"),
    ],
)
def test_wrong_functions_in_python_are_rejected(body, message):
    write("m.py", f"def f(a, b):\n    {body}\n")
    refused("int8:m.py:f", message)


def test_missing_function_in_python_is_named():
    write("m.py", "f = 1\n")
    refused("int8:m.py:f", r"m\.py has no function f")


def test_files_are_run_once_a_command():
    write("m.py", "open('executions', 'a').write('x')\ndef f(a, b): return a * b\n")
    run = {}
    assert resolve("int8:m.py:f", run) == resolve("int8:m.py:f", run)
    assert Path("executions").read_text() == "x"


# Tables


def saved(table: np.ndarray, form: str) -> str:
    """Write a table in a form, the suffix behind its last dot if it has one; return the file."""
    size, flat = len(table), ", ".join(map(str, table.flat))
    nested = ",\n".join("{" + ", ".join(map(str, row)) + "}" for row in table)
    words = ", ".join(f"0x{one & 0xFFFF:04X}u" for one in table.ravel().tolist())
    texts = {
        "rows.txt": "\n".join(" ".join(map(str, row)) for row in table),
        "commas.txt": "# products\n" + "\n".join(", ".join(map(str, row)) + "," for row in table),
        "flat.txt": flat,
        "savetxt.txt": "\n".join(" ".join(f"{one:.18e}" for one in row) for row in table),
        "nested.h": f"#include <stdint.h>\nconst int16_t lut [{size}][{size}] = {{{nested}}};\n",
        "flat.c": f"int small[2] = {{1, 2}};\nstatic int32_t lut[] PROGMEM = {{{flat},}};\n",
        "words.h": f"/* 16 bits */ unsigned short lut[{size * size}] = {{{words}}};",
    }
    if form in texts:
        return write(form, texts[form])
    if form in ("u2.bin", "i4.bin"):
        Path(form).write_bytes(table.astype("<" + form.removesuffix(".bin")).tobytes())
        return form
    np.save("t.npy", table.ravel() if form == "flat.npy" else table.astype(form))
    return "t.npy"


FORMS = ["int16", "int32", "int64", ">i4", "uint16", "flat.npy", "u2.bin", "i4.bin", "rows.txt", "commas.txt"]
FORMS += ["flat.txt", "savetxt.txt", "nested.h", "flat.c", "words.h"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_signed_tables_are_read_in_both_orders(form, bits):
    table = lopsided(Operands(bits, True))
    assert np.array_equal(read(f"int{bits}:{saved(by_numbers(table), form)}"), table)
    if bits == 4:
        assert np.array_equal(read(f"int4:{saved(table, form)}"), table)
        assert np.array_equal(read(f"int4:{saved(table.T, form)}@transposed"), table)


@pytest.mark.parametrize("form", ["int16", "uint16", "int32", "rows.txt", "u2.bin", "i4.bin", "nested.h", "words.h"])
def test_unsigned_tables_are_read(form):
    """Products above 32,767 are negative as 16-bit signed numbers."""
    table = np.outer(np.arange(256), np.arange(256))
    table[3] = 0
    stored = table.astype(np.int16) if form == "nested.h" else table
    assert np.array_equal(read(f"uint8:{saved(stored, form)}"), table)
    np.save("t.npy", table)
    assert np.array_equal(read("uint8:t.npy@transposed"), table.T)


def test_numbers_of_an_array_have_notations_of_c():
    write("t.h", "int lut[4][4] = { {0, 00, 0x0, 0}, {0, 0x1, 2u, +3L}, {0, 2, 04, 6}, {0, 3, -6, 011ULL}, };")
    assert read("uint2:t.h").tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [0, 2, 4, 6], [0, 3, -6, 9]]


def test_signed_products_of_2n_bits_are_read():
    """Four-bit operands have 8-bit products, here as bytes."""
    table = lopsided(Operands(4, True))
    np.save("t.npy", table.astype(np.uint8))
    assert np.array_equal(read("int4:t.npy"), table)


def test_orders_that_cannot_be_told_are_asked_for():
    table = random_table(SIGNED)
    np.save("t.npy", table)
    refused("int8:t.npy", r"^int8:t\.npy: .*codes: 0\.\.127, -128\.\.-1.*sorted: -128\.\.127.*@codes or @sorted behind")
    assert np.array_equal(read("int8:t.npy@codes"), table)
    assert np.array_equal(by_numbers(read("int8:t.npy@sorted")), table)
    assert np.array_equal(by_numbers(read("int8:t.npy@sorted@transposed")), table.T)
    refused("int8:t.npy@sorted@codes", "a table has one order, codes or sorted")
    assert np.array_equal(read("uint8:t.npy"), table)


def test_named_order_wins_over_the_content():
    table = lopsided(SIGNED)
    np.save("t.npy", table)
    assert np.array_equal(by_numbers(read("int8:t.npy@sorted")), table)


def npy(array: object) -> bytes:
    np.save("made.npy", array)
    return Path("made.npy").read_bytes()


WRONG_TABLES = {
    "size of .npy": (
        "t.npy",
        lambda: npy(np.zeros((16, 16), int)),
        "has 16 x 16 numbers, not the 256 x 256 products",
    ),
    "shape of .npy": ("t.npy", lambda: npy(np.zeros((512, 128), int)), r"has 512 x 128 numbers, not the 256 x 256"),
    "floats": ("t.npy", lambda: npy(np.zeros((256, 256))), r"t\.npy holds float64, not integers"),
    "pickles": ("t.npy", lambda: npy(np.array([None])), r"t\.npy cannot be read as \.npy: Object arrays"),
    "damage": ("t.npy", lambda: b"\x93NUMPY\x01\x00", r"t\.npy cannot be read as \.npy"),
    "33 bits": ("t.npy", lambda: npy(np.full((256, 256), 1 << 31)), r"t\.npy: the product 2147483648 has more than 32"),
    "size of .bin": (
        "t.bin",
        lambda: bytes(100),
        r"t\.bin has 100 bytes, but .* have 131,072 as 16-bit or 262,144",
    ),
    "size of .txt": ("t.txt", lambda: b"1 2 3\n4 5", r"t\.txt has 5 numbers, not the 256 x 256 products of int8"),
    "word": ("t.txt", lambda: b"1 2\n3 x", r"t\.txt, line 2: 'x' is not an integer"),
    "fraction": ("t.txt", lambda: b"1.5", r"t\.txt, line 1: '1\.5' is not an integer"),
    "not a number": ("t.txt", lambda: b"nan", r"line 1: 'nan' is not an integer"),
    "large in .txt": ("t.txt", lambda: b"99999999999", r"t\.txt: the product 99999999999 has more than 32 bits"),
    "size of array": (
        "t.h",
        lambda: b"int lut[2][2] = {{1, 2}, {3, 4}};",
        "lut has 4 numbers, not the 256 x 256",
    ),
    "words in array": ("t.h", lambda: b"int lut[2] = {1, sizeof(int)};", r"t\.h: lut has 'sizeof\(int\)' among its"),
    "arrays": ("t.h", lambda: 2 * (b"int lut[] = {" + b"1," * 65_536 + b"};\n"), r"t\.h has several tables: lut, lut"),
    "empty": ("t.txt", lambda: b"", r"t\.txt has 0 numbers"),
    "too large": ("t.txt", lambda: bytes(9 << 20), r"t\.txt is larger than 8 MiB"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_tables_are_rejected(case):
    file, content, message = WRONG_TABLES[case]
    Path(file).write_bytes(content())
    refused(f"int8:{file}", message)


@pytest.mark.parametrize("name", ["int8:no.c", "int8:no.py:f", "int8:no.npy", "int8:no.bin", "uint8:.", "int8:"])
def test_missing_files_are_named(name):
    refused(name, "no such file|write u?int8:FILE with a file")


# Commands


@pytest.mark.parametrize("name", ["drum-int4-k3", "mbm-uint8", "int8:random.npy@codes", "int8:mirrored.npy@codes"])
def test_exported_tables_are_read_back(name):
    np.save("random.npy", random_table(SIGNED))
    np.save("mirrored.npy", by_numbers(lopsided(SIGNED)))
    answer = mbm("multipliers", "export", name, "out.npy")
    assert answer.code == 0, answer.err
    reads = answer.out.split()[-1]
    assert reads == f"{resolve(name).operands}:out.npy" + "@codes" * ("@" in name)
    assert resolve(reads).content.digest == resolve(name).content.digest
    assert np.load("out.npy").dtype == np.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exact-int8", "out.bin"], "out.bin: name a .npy file"),
        (["exact-int8", "out.npy", "--bits", "5"], "--bits is for fractions, but exact-int8 multiplies int8"),
        (["exact-int8", "nowhere/out.npy"], "cannot be written"),
        (["mbm-uint16", "out.npy"], "mbm-uint16 is for mbm characterize"),
    ],
)
def test_wrong_exports_are_refused(arguments, message):
    answer = mbm("multipliers", "export", *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert not list(Path().iterdir())


def shown(name: str) -> dict:
    answer = mbm("multipliers", "show", name, "--json")
    assert answer.code == 0, answer.err
    return answer.json


def test_show_has_the_figures_of_a_table():
    table = lopsided(Operands(4, True))
    table[2, 3] += 5
    np.save("t.npy", table)
    found = shown("int4:t.npy")
    numbers = [*range(8), *range(-8, 0)]
    pairs = [(a, b) for a in range(16) for b in range(16)]
    exact = {(a, b): numbers[a] * numbers[b] for a, b in pairs}
    errors = {pair: int(table[pair]) - exact[pair] for pair in pairs}
    relative = [abs(errors[pair] / exact[pair]) for pair in pairs if exact[pair]]
    assert found["operands"] == "int4"
    assert found["file"] == "t.npy"
    assert found["mae"] == pytest.approx(sum(map(abs, errors.values())) / 256)
    assert found["wce"] == max(map(abs, errors.values())) == 5
    assert found["ep"] == pytest.approx(100 * sum(error != 0 for error in errors.values()) / 256)
    assert found["mre"] == pytest.approx(100 * sum(relative) / len(relative))
    assert found["bias"] == pytest.approx(sum(errors.values()) / 256)
    assert found["asymmetric_pairs"] == sum(bool(table[a, b] != table[b, a]) for a, b in pairs if a < b)
    assert (found["zero_activation"], found["zero_weight"]) == (True, False)
    assert found["rank"] == np.linalg.matrix_rank(table.astype(float))
    assert found["terms"] >= 1
    assert (found["costs"], found["warnings"]) == ({}, [])


def test_show_prints_costs_and_figures():
    write("m.c", PUBLISHED + f"int16_t f(int8_t A, int8_t B) {BODY}")
    answer = mbm("multipliers", "show", "int8:m.c")
    lines = {" ".join(line.split()) for line in answer.out.splitlines()}
    assert {"operands int8", "file m.c", "worst-case error 1", "error probability 50.00 %", "rank 2"} <= lines
    assert {"power 0.301 mW", "area 558.9 um2", "delay 1.36 ns", "activation x 0 not always 0", "0 x weight 0"} <= lines
    assert "warning" not in answer.out


def test_show_warns_of_a_defective_quadrant():
    table = defective()
    numbers = np.where(np.arange(256) < 128, np.arange(256), np.arange(256) - 256)
    right = np.outer(numbers & ~1, numbers & ~1)
    assert (table != right).sum() == 12_414
    assert (table[128:, 128:] != right[128:, 128:]).sum() == 12_414
    np.save("1L2H.npy", table)
    np.save("right.npy", right)
    (warning,) = shown("int8:1L2H.npy")["warnings"]
    assert warning == (
        "both operands negative: 252 products have the wrong sign, for example -128 x -127 = -16128; none elsewhere"
    )
    assert shown("int8:right.npy")["warnings"] == []
    printed = mbm("multipliers", "show", "int8:1L2H.npy").out
    assert "warning: both operands negative: 252 products" in printed


def test_show_warns_of_errors_in_one_quadrant():
    numbers = SIGNED.numbers()
    table = np.outer(numbers, numbers)
    table[1:128, 129:] += 40
    np.save("t.npy", table)
    (warning,) = shown("int8:t.npy")["warnings"]
    assert warning.startswith("activation positive, weight negative: the mean relative error is")
    assert warning.endswith("but at most 0 % for other signs")
    for name in ("drum-int8-k3", "mbm-int8", "exact-int8", "mbm-uint8"):
        assert shown(name)["warnings"] == []


def test_show_names_float_multipliers_alone():
    answer = mbm("multipliers", "show", "mbm-t8")
    assert "the minimally biased multiplier" in answer.out
    assert "mbm characterize mbm-t8 measures its errors" in answer.out
    assert shown("mbm-t8")["name"] == "mbm-t8"
    answer = mbm("multipliers", "show", "mbm-uint16")
    assert answer.code == 2
