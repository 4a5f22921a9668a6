"""Repeat the experiment of docs/approximate-training.md: `.venv/bin/python docs/approximate_training.py RUNS`.

Trains with approximate products in no, some and all passes, as `mbm compare` does, into the folder RUNS; prints the
tables of the document and draws its picture. Comparisons that are there already are not repeated. On a GPU several run
at once (--jobs), so that their times say nothing.
"""

import argparse
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from mbm_cli.data import DATASETS
from mbm_cli.models import build

FIGURE = Path(__file__).parent / "figures" / "training.png"
PASSES = {
    "forward": "exact",
    "forward, gradient of input": "{input: same}",
    "forward, gradient of weight": "{weight: same}",
    "everything": "same",
}
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73")
EXPERIMENTS = [
    *(
        ("lenet", multiplier, 5)
        for multiplier in ("mbm", "mbm-t16-r7", "mitchell-t16-r7", "drum-k4", "mbm-t20-r3", "mbm-t22-r1", "drum-k2")
    ),
    *((network, multiplier, 3) for network in ("mlp", "cnn3") for multiplier in ("mbm-t16-r7", "mbm-t20-r3")),
]


def everywhere(network: str, multiplier: str) -> str:
    """Return the multiplier of every layer of a network."""
    convolutions = "" if network == "mlp" else f"conv2d: {multiplier}, "
    return f"{{{convolutions}linear: {multiplier}}}"


def compare(runs: Path, network: str, multiplier: str, seeds: int, device: str) -> dict[str, Any]:
    """Compare exact training with training by the multiplier in each choice of passes; return `compare.json`."""
    folder = runs / f"{network}-{multiplier}"
    if not list(folder.glob("*/compare.json")):
        command = [sys.executable, "-m", "mbm_cli", "compare", "exact-vs-mbm", "--config", f"{network}-exact"]
        command += ["--multiplier", everywhere(network, multiplier), "--backward", ",".join(PASSES.values())]
        command += ["--seeds", str(seeds), "--device", device, "--output", str(folder), "--quiet"]
        subprocess.run(command, check=True)
    (path,) = folder.glob("*/compare.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def table(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Return the test accuracies, and the differences to exact training with their intervals, in Markdown."""
    lines = ["| network | multiplier | exact | " + " | ".join(PASSES) + " |", "| --- " * (3 + len(PASSES)) + "|"]
    for (network, multiplier), result in results.items():
        exact, *columns = result["columns"]
        cells = []
        for column in columns:
            difference = column["accuracy_difference"]
            low, mean, high = (100 * difference[name] for name in ("low", "mean", "high"))
            cells.append(f"{100 * column['test_accuracy_mean']:.2f} ({mean:+.2f}, {low:+.2f} to {high:+.2f})")
        cells = [f"{100 * exact['test_accuracy_mean']:.2f}", *cells]
        lines.append(f"| `{network}` | `{multiplier}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[tuple[str, str], dict[str, Any]]) -> bytes:
    """Draw the differences to exact training, a row for each network and multiplier, a color for each choice."""
    figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results.values()):
        for i, (name, column) in enumerate(zip(PASSES, result["columns"][1:], strict=True)):
            difference = {key: 100 * value for key, value in column["accuracy_difference"].items()}
            y, mean = row + 0.18 * (i - 1.5), difference["mean"]
            axes.plot([difference["low"], difference["high"]], [y, y], color=COLORS[i], linewidth=1)
            axes.plot(mean, y, "osD^"[i], color=COLORS[i], markersize=4, label=name if row == 0 else None)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{network}, {multiplier}" for network, multiplier in results])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("test accuracy against exact training (points), mean and 95 % interval")
    figure.legend(loc="outside upper center", ncols=2)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def gradient_errors(runs: Path, device: str) -> str:
    """Compare gradients of LeNet's weights with the exact ones: at the first weights, and at trained ones.

    The scale is the factor by which an approximate gradient is longer along the exact one, <g, e> / <e, e>; the angle
    is between the two. Both are of the gradient of all weights, of the loss of 1,000 training images.
    """
    train, _ = DATASETS["mnist"].load(torch.device(device), None, 1000, 1)
    checkpoint = sorted(runs.glob("lenet-mbm/*/lenet-exact-seed0*/checkpoint.pt")) or sorted(
        runs.glob("lenet-mbm/*/*exact*seed0*/checkpoint.pt")
    )
    trained = torch.load(checkpoint[0], weights_only=True, map_location=device)["model"]

    def gradient(weights: dict[str, torch.Tensor], multiplier: str, backward: str | dict[str, str]) -> torch.Tensor:
        model = build(
            "lenet", "exact" if multiplier == "exact" else {"conv2d": multiplier, "linear": multiplier}, backward
        )
        model.to(device).load_state_dict(weights)
        F.cross_entropy(model(train.images), train.labels).backward()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if name.endswith("weight")])

    torch.manual_seed(0)
    first = build("lenet", "exact").state_dict()
    lines = ["| weights | multiplier | " + " | ".join(PASSES) + " |", "| --- " * (2 + len(PASSES)) + "|"]
    for name, weights in (("first", first), ("trained", trained)):
        exact = gradient(weights, "exact", "exact").double()
        for multiplier in dict.fromkeys(multiplier for _, multiplier, _ in EXPERIMENTS):
            cells = []
            for backward in ("exact", {"input": multiplier}, {"weight": multiplier}, multiplier):
                found = gradient(weights, multiplier, backward).double()
                cosine = torch.dot(found, exact) / (found.norm() * exact.norm())
                scale = torch.dot(found, exact) / exact.square().sum()
                cells.append(f"{scale:.3f}, {torch.rad2deg(torch.acos(cosine.clamp(-1, 1))):.1f} deg")
            lines.append(f"| {name} | `{multiplier}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        made = list(pool.map(lambda one: compare(given.runs, *one, given.device), EXPERIMENTS))
    results = {(network, multiplier): one for (network, multiplier, _), one in zip(EXPERIMENTS, made, strict=True)}
    print(table(results), gradient_errors(given.runs, given.device), sep="\n\n")
    FIGURE.write_bytes(draw(results))


if __name__ == "__main__":
    main()
