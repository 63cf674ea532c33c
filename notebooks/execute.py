"""Run the notebooks and keep their outputs.

    KERAS_BACKEND=tensorflow python notebooks/execute.py
    KERAS_BACKEND=tensorflow python notebooks/execute.py notebooks/character_model.ipynb

Nothing is kept that differs from machine to machine without need: no times of cells, no
versions of Python.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path, folder=HERE, **environment):
    """Runs a notebook in a process of its own; raises if one of its cells does.

    Args:
        path: The notebook's file, which stays as it is.
        folder: Where it runs.
        **environment: Environment variables on top of those of this process.

    Returns:
        The notebook with the outputs that it made.
    """
    notebook = nbformat.read(path, as_version=4)
    search = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        # This checkout's package, installed or not.
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **environment,
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Libraries report on themselves there, when nothing is wrong.
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main():
    for path in map(Path, sys.argv[1:] or NOTEBOOKS):
        start = time.perf_counter()
        nbformat.write(executed(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
