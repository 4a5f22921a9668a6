"""A run's folder: create it, write each file whole or not at all, list the folders, read them back."""

import difflib
import io
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mbm_cli.errors import RequestError, RunError

SUMMARY_FIELDS = {
    *("status", "multiplier", "device", "epochs", "test_accuracy", "best_test_accuracy"),
    *("epoch_seconds", "train_seconds", "total_seconds"),
}


@dataclass(frozen=True)
class Run:
    """A run's folder and the files in it; runs/README.md says what each holds."""

    folder: Path

    @classmethod
    def create(cls, output: Path, name: str) -> "Run":
        """Make a folder of its own, ``<UTC time>-<name>-<short id>``, below ``output``.

        Raises:
            RunError: the folder cannot be made.
        """
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        folder = output / f"{stamp}-{name}-{secrets.token_hex(2)}"
        try:
            output.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if folder.exists():  # the id of another run of this second
                return cls.create(output, name)
            raise RunError(f"cannot make a run folder: {output} is a file; name another with --output") from None
        except OSError as error:
            raise RunError(
                f"cannot make the run folder {folder} ({error.strerror}): name another with --output"
            ) from error
        return cls(folder)

    @classmethod
    def find(cls, name: str, output: Path) -> "Run":
        """The run at a path, or of that name below ``output``.

        Raises:
            RequestError: there is none.
        """
        for folder in (Path(name), output / name):
            if (folder / "summary.json").is_file():
                return cls(folder.resolve() if folder.name == "" else folder)
        near = difflib.get_close_matches(name, [run.name for run in list_runs(output)], n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ": mbm runs list shows those there are"
        raise RequestError(f"no run {name!r}, neither as a path nor in {output}{hint}")

    @property
    def name(self) -> str:
        return self.folder.name

    def refuse_several(self) -> None:
        """Where one training run is needed, a comparison's or a sweep's folder is not one.

        Raises:
            RequestError: this is such a folder.
        """
        if (self.folder / "plan.json").exists():
            example = next((f", for example {run.folder}" for run in list_runs(self.folder)), "")
            raise RequestError(f"{self.folder} holds several runs: name one of them{example}")

    def discard(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole or not at all: under a temporary name first, then renamed.

        Raises:
            RunError: the folder cannot be written.
        """
        data = content.encode() if isinstance(content, str) else content
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{name}-", delete=False) as file:
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    os.chmod(file.name, 0o644)
                    os.replace(file.name, self.folder / name)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            raise RunError(
                f"cannot write {self.folder / name} ({error.strerror}): free space or name --output"
            ) from error

    def write_json(self, name: str, value: object) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def write_metrics(self, epochs: list[dict[str, Any]]) -> None:
        self.write("metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in epochs))

    def write_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def config_text(self) -> str:
        return self._read("config.yaml")

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds.

        Raises:
            RunError: it cannot be read, or a field is missing.
        """
        summary = self.read_json("summary.json")
        missing = SUMMARY_FIELDS - summary.keys()
        if missing:
            raise RunError(f"{self.folder / 'summary.json'} is damaged (without {', '.join(sorted(missing))})")
        return summary

    def environment(self) -> dict[str, Any]:
        return self.read_json("environment.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """What a JSON file of the run holds.

        Raises:
            RunError: it cannot be read, or holds no JSON object.
        """
        return self._parse(name, self._read(name))

    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary an epoch; empty before the first epoch has ended."""
        if not (self.folder / "metrics.jsonl").exists():
            return []
        return [self._parse("metrics.jsonl", line) for line in self._read("metrics.jsonl").splitlines()]

    def checkpoint(self) -> dict[str, Any] | None:
        """The state after the last epoch that ended, on the CPU; ``None`` before that."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged or foreign archive raises is not one kind
            raise RunError(f"{path} cannot be read ({type(error).__name__}): delete it to start again") from error

    def _read(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise RunError(f"{self.folder / name} cannot be read ({reason}): the run is damaged") from error

    def _parse(self, name: str, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RunError(f"{self.folder / name} is damaged ({error})") from error
        if not isinstance(value, dict):
            raise RunError(f"{self.folder / name} is damaged (not a JSON object)")
        return value


def list_runs(output: Path) -> list[Run]:
    """The runs below ``output``, the oldest first."""
    if not output.is_dir():
        return []
    return [Run(folder) for folder in sorted(output.iterdir()) if (folder / "summary.json").is_file()]
