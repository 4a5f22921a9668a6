"""Run the notebook from top to bottom and store its outputs: ``make notebook``."""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from mbm_cli.data import data_root

NOTEBOOK = Path(__file__).with_name("mnist_mbm.ipynb")
CELL_SECONDS = 1800


def execute(size: str = "") -> NotebookNode:
    """Run the notebook in an empty folder and return it with its new outputs.

    Args:
        size: ``small`` only checks that every cell runs; the empty string runs it in full.

    Raises:
        CellExecutionError: A cell failed. The error says which, and why.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # Relative names: outputs show where the data is, and this machine's folders mean nothing to readers.
        data = data_root(None)
        data.mkdir(parents=True, exist_ok=True)
        Path(folder, "data").symlink_to(data, target_is_directory=True)
        own = {"MBM_NOTEBOOK": size, "MBM_DATA_DIR": "data", "CUPY_CACHE_DIR": "cupy"}
        where = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=CELL_SECONDS, coalesce_streams=True, resources=where)
        client.execute(env={**os.environ, **own})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times at which each cell ran
    return notebook


if __name__ == "__main__":
    nbformat.write(execute(), NOTEBOOK)
    print(f"{NOTEBOOK} now holds the outputs of this machine")
