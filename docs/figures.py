"""Draw the pictures of the documents, docs/figures/*.png: `make docs-figures`.

All but one are copies of pictures that the project's own commands draw. Those that show a GPU are drawn only where
there is one.
"""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure

import mbm_cli

FIGURES = Path(__file__).parent / "figures"
LARGEST = 150_000  # bytes

# The command, the picture that it draws, and that picture's name in docs/figures.
ANYWHERE = (
    ("mbm characterize mitchell mbm", "characterize.png", "errors.png"),
    ("mbm characterize mitchell mbm drum-k6 --samples 1000000 --sweep-truncate", "sweep-truncate.png", "truncated.png"),
)
ON_A_GPU = (
    ("mbm compare exact-vs-mbm --multiplier mbm,mbm-t16-r7", "compare.png", "compare.png"),
    ("mbm profile epoch", "profile.png", "epoch.png"),
)


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    keep("significands.png", significands())
    print("significands.png: drawn by docs/figures.py")
    for command, picture, name in ANYWHERE:
        run(command, picture, name)
    for command, picture, name in ON_A_GPU:
        if torch.cuda.is_available():
            run(f"{command} --device cuda", picture, name)
        else:
            print(f"{name}: left as it is, `{command}` on a GPU makes it")


def run(command: str, picture: str, name: str) -> None:
    """Run an mbm command in a temporary folder and keep the picture from its run."""
    print(f"{name}: {command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*command.split()[1:], "--output", folder, "--quiet"]
        subprocess.run([Path(sys.executable).with_name("mbm"), *arguments], check=True)
        (drawn,) = Path(folder).glob(f"*/{picture}")
        keep(name, drawn.read_bytes())


def keep(name: str, png: bytes) -> None:
    """Write a picture to docs/figures, or exit when it is too large for the repository."""
    if len(png) > LARGEST:
        raise SystemExit(f"{name} has {len(png):,} bytes, more than {LARGEST:,}")
    (FIGURES / name).write_bytes(png)


def significands() -> bytes:
    """Plot products of two significands, exact and approximate, against the sum of their fractions."""
    s = torch.linspace(0, 1.998, 1000)
    half = s / 2
    lowest = torch.where(s < 1, 1 + s, 2 * s)
    highest = (1 + half) ** 2
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    whole, error = figure.subplots(1, 2)
    for axes, shown in ((whole, lambda w: w), (error, lambda w: 100 * (w / lowest - 1))):
        axes.fill_between(s, shown(lowest), shown(highest), color="0.8", label="exact, all pairs")
        for name, color, line in (("mitchell", "#0072B2", "--"), ("mbm", "#D55E00", "-")):
            w = mbm_cli.multiply(1 + half, 1 + half, name)  # the products of these families depend on the sum alone
            axes.plot(s, shown(w), color=color, linestyle=line, label=name)
        axes.set_xlabel("sum of the fractions, x + y")
        axes.grid(alpha=0.3)
    whole.set_ylabel("product of the significands")
    error.set_ylabel("above Mitchell's product (%)")
    whole.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


if __name__ == "__main__":
    main()
