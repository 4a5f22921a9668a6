"""Repeat the experiment of docs/approximate-training.md: `.venv/bin/python docs/approximate_training.py RUNS`.

Trains with approximate products in no, some and all passes, as `mbm compare` does, into the folder RUNS; prints the
tables of the document and draws its picture. Comparisons that are there already are not repeated. On a GPU several run
at once (--jobs), so that their times say nothing.
"""

import argparse
import io
import itertools
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
from mbm_cli.multipliers.names import Backward

FIGURE = Path(__file__).parent / "figures" / "training.png"
PASSES = {
    "forward": "exact",
    "forward, gradient of input": "{input: same}",
    "forward, gradient of weight": "{weight: same}",
    "everything": "same",
}
NEARLY_EXACT = "exact-t1"  # gradients have multipliers of their own only behind an approximate forward pass
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
    axes.set_xscale("symlog", linthresh=0.5)
    ticks = (-5, -2, -1, -0.5, -0.25, 0, 0.25, 0.5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("test accuracy against exact training, points (mean, 95 % interval)")
    figure.legend(loc="outside upper center", ncols=2)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def exact_weights(runs: Path, device: str) -> dict[str, torch.Tensor]:
    """Train LeNet exactly, unless it is there already; return its weights."""
    folder = runs / "lenet-exact"
    if not list(folder.glob("*/curves.png")):
        command = [sys.executable, "-m", "mbm_cli", "train", "--config", "lenet-exact", "--device", device]
        subprocess.run([*command, "--output", str(folder), "--quiet"], check=True)
    (path,) = folder.glob("*/checkpoint.pt")
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")["model"]
    return weights


class Gradients:
    """Gradients of LeNet's weights, of the loss of some training images, compared with the exact ones.

    The scale is the factor by which a gradient g is longer along the exact one e, <g, e> / <e, e>; the angle is between
    the two.
    """

    def __init__(self, weights: dict[str, torch.Tensor], images: int = 1000) -> None:
        self.weights = weights
        self.images, _ = DATASETS["mnist"].load(torch.device("cpu"), None, images, 1)
        self.exact = self.of("exact", "exact")

    def of(self, multiplier: str, backward: str | dict[str, str]) -> dict[str, torch.Tensor]:
        layers = {"conv2d": multiplier, "linear": multiplier}
        model = build("lenet", "exact" if multiplier == "exact" else layers, Backward.of(backward))
        model.load_state_dict(self.weights)
        F.cross_entropy(model(self.images.images), self.images.labels).backward()
        named = model.named_parameters()
        return {name.split(".")[0]: p.grad.double().flatten() for name, p in named if name.endswith("weight")}

    def compared(self, found: dict[str, torch.Tensor], layers: list[str]) -> str:
        g, e = (torch.cat([one[layer] for layer in layers]) for one in (found, self.exact))
        scale, cosine = torch.dot(g, e) / e.square().sum(), torch.dot(g, e) / (g.norm() * e.norm())
        return f"{scale:.2f}, {torch.rad2deg(torch.acos(cosine.clamp(-1, 1))):.0f}°"


def gradient_tables(weights: dict[str, torch.Tensor]) -> str:
    """Return scales and angles in Markdown: of all weights, for each choice of passes; then of one gradient alone, for
    averages over more and more images, and layer by layer.
    """
    torch.manual_seed(0)
    first = build("lenet", "exact").state_dict()
    lines = ["| weights | multiplier | " + " | ".join(PASSES) + " |", "| --- " * (2 + len(PASSES)) + "|"]
    trained = Gradients(weights)
    for name, one in (("first", Gradients(first)), ("trained", trained)):
        for multiplier in dict.fromkeys(multiplier for _, multiplier, _ in EXPERIMENTS):
            choices = ("exact", {"input": multiplier}, {"weight": multiplier}, multiplier)
            cells = [one.compared(one.of(multiplier, choice), list(one.exact)) for choice in choices]
            lines.append(f"| {name} | `{multiplier}` | " + " | ".join(cells) + " |")
    layers, coarse = list(trained.exact), ("mbm-t22-r1", "drum-k2")
    lines += ["", "| weights, images, gradient | " + " | ".join(coarse) + " |", "| --- " * (1 + len(coarse)) + "|"]
    for name, images, gradient in itertools.product(("first", "trained"), (64, 1000, 10_000), ("input", "weight")):
        one = Gradients(first if name == "first" else weights, images)
        cells = [one.compared(one.of(NEARLY_EXACT, {gradient: multiplier}), layers) for multiplier in coarse]
        lines.append(f"| {name}, {images:,}, {gradient} | " + " | ".join(cells) + " |")
    lines += ["", "| approximate alone | multiplier | " + " | ".join(layers) + " |", "| --- " * (2 + len(layers)) + "|"]
    for gradient in ("input", "weight"):
        for multiplier in coarse:
            found = trained.of(NEARLY_EXACT, {gradient: multiplier})
            cells = [trained.compared(found, [layer]) for layer in layers]
            lines.append(f"| gradient of {gradient} | `{multiplier}` | " + " | ".join(cells) + " |")
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
    print(table(results), gradient_tables(exact_weights(given.runs, given.device)), sep="\n\n")
    FIGURE.write_bytes(draw(results))


if __name__ == "__main__":
    main()
