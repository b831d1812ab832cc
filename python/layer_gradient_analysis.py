#!/usr/bin/env python3
"""Layer statistics of a language model: runs gradlens, and loads what it saved.

As a script it runs the program ``gradlens layer`` with the flags it is given, unchanged, so that command lines of the
Python script of this name go on working::

    python layer_gradient_analysis.py --layers 0-3 --aggregate_by gradients --save_outputs

The program is the one that the environment variable ``GRADLENS_BIN`` names, else ``../target/release/gradlens`` beside
this file, else ``gradlens`` on ``PATH``. No Python runs beside it, and the exit code is the program's.

As a module it loads results::

    from layer_gradient_analysis import load_results

    results = load_results("layer_activations_model_…")   # a results folder, or an .npz
    results["data"]["layer_0_mean_abs"]                    # float32 [D]
    results["metadata"]["dimension_sizes"]                 # {0: 896, 1: 896, …}

Running needs the standard library alone, loading needs NumPy. Python 3.9 or newer.
"""

import json
import os
import shutil
import sys
from pathlib import Path

__all__ = ["load_results"]

#: The archive in a results folder.
CONSOLIDATED = "consolidated_results.npz"
#: How the name of a single array's file ends; what comes before is its key in the archive.
ARRAY_ENDING = "_gradients.npy"


def load_results(path):
    """Loads the results of a run.

    Args:
        path: An ``.npz`` (``consolidated_results.npz``, or what ``--save_consolidated`` named), or a results folder. Of
            a folder its ``consolidated_results.npz`` is read; where there is none, its ``.npy`` files and
            ``metadata.json``, which hold the same.

    Returns:
        ``{"data": {key: array}, "metadata": dict}``. Keys are ``layer_0_mean_abs``, ``layer_0_mean_norm_sum``, …; the
        metadata has ``model_name``, ``layers``, ``aggregate_by``, ``dimension_sizes`` and so on, all on one level.

    Raises:
        FileNotFoundError: There is nothing at ``path``, or the folder holds no results.
        ValueError: The file is not a results archive.

    The metadata in an ``.npz`` are pickled, and unpickling runs what the file says: load only files you trust.
    """
    path = Path(path)
    if path.is_dir():
        archive = path / CONSOLIDATED
        return _load_archive(archive) if archive.is_file() else _load_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no results at {path}: expected an .npz file or a results folder of gradlens")
    return _load_archive(path)


def _load_archive(path):
    import numpy as np

    wrong = f"{path} is not a results archive: expected an .npz of gradlens with an entry 'metadata'"
    if path.suffix != ".npz":
        raise ValueError(wrong)
    try:
        archive = np.load(path, allow_pickle=True)
    except Exception as cause:  # NumPy raises what zip, pickle or the header happen to raise.
        raise ValueError(f"{wrong} ({cause})") from cause
    # A single array under the name .npz comes back as an array.
    if not hasattr(archive, "files"):
        raise ValueError(wrong)
    with archive:
        if "metadata" not in archive.files:
            raise ValueError(wrong)
        metadata = archive["metadata"].item()
        return {"data": {key: archive[key] for key in archive.files if key != "metadata"}, "metadata": metadata}


def _load_folder(folder):
    import numpy as np

    described = folder / "metadata.json"
    files = sorted(folder.glob("layer_*" + ARRAY_ENDING), key=_layer_then_name)
    if not files or not described.is_file():
        raise FileNotFoundError(
            f"no results in the folder {folder}: expected {CONSOLIDATED}, or metadata.json and layer_*{ARRAY_ENDING}"
        )
    with open(described, encoding="utf-8") as file:
        found = json.load(file)
    metadata = {}
    for part in ("experiment_info", "analysis_config", "run_info"):
        metadata.update(found.get(part, {}))
    # The JSON file writes the time for people, the archive as in the folder's name: 20250102_030405.
    timestamp = metadata.get("timestamp")
    if isinstance(timestamp, str):
        metadata["timestamp"] = timestamp.replace("-", "").replace(":", "").replace(" ", "_")
    sizes = found.get("dimension_info", {})
    metadata["dimension_sizes"] = {int(name.rpartition("_")[2]): size for name, size in sizes.items()}
    return {"data": {file.name[: -len(ARRAY_ENDING)]: np.load(file) for file in files}, "metadata": metadata}


def _layer_then_name(file):
    """Layer 10 comes after layer 9, as in the archive."""
    layer = file.name.split("_")[1]
    return (int(layer) if layer.isdigit() else sys.maxsize, file.name)


def _find_program():
    """Returns the path of the program, or raises FileNotFoundError with the message for the user."""
    name = "gradlens.exe" if os.name == "nt" else "gradlens"
    root = Path(__file__).resolve().parent.parent
    built = root / "target" / "release" / name
    named = os.environ.get("GRADLENS_BIN")
    if named:
        # Who names a program wants that one: there is no second choice.
        places = [(f"GRADLENS_BIN={named}", named)]
        hint = "set GRADLENS_BIN to the path of the program, or unset it"
    else:
        places = [(str(built), str(built)), (f"{name} on PATH", name)]
        hint = f"build it with `cargo build --release` in {root}, or set GRADLENS_BIN to where it is"
    for _, place in places:
        program = shutil.which(place)
        if program is not None:
            return os.path.abspath(program)
    looked = "\n            ".join(text for text, _ in places)
    raise FileNotFoundError(
        "the program gradlens was not found\n"
        f"  where:    {looked}\n"
        "  expected: an executable file\n"
        "  found:    none\n"
        f"\nhint: {hint}"
    )


def _run(program, arguments):
    """Becomes the program; where a process cannot do that, waits for it and returns its exit code."""
    command = [program, *arguments]
    if os.name != "nt":
        os.execv(program, command)
    import subprocess

    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # Ctrl-C reached the program too, which decides what to do about it.
                continue


def main(command="layer"):
    """Runs a command of the program with this script's arguments.

    Returns the program's exit code; 1 where it cannot be run.
    """
    try:
        return _run(_find_program(), [command, *sys.argv[1:]])
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
