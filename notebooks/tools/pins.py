"""Rewrite requirements.txt from the loose bounds in pyproject.toml (`make pins`).

One file serves Python 3.10 to 3.13 on Linux, macOS and Windows: uv resolves for all of them at once and
writes environment markers where they differ. Needs `uv` in the running environment, and a network.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Pinned by hand: the version that the committed outputs were made with.
BY_HAND = ["torch==2.13.0"]

# What torch's default Linux wheel asks for: gigabytes that the CPU build does without. pip fetches them by
# itself when it installs the default wheel, so leaving the lines out costs a GPU user nothing.
GPU_ONLY = re.compile(r"^(nvidia-|cuda-|triton\b)")

HEADER = """\
# Exact versions of everything the course and its tests use: Python 3.10 to 3.13, Linux, macOS, Windows.
# Written by `make pins` from the loose bounds in pyproject.toml; do not edit by hand.
#
# Linux without an NVIDIA GPU: PyPI's torch brings gigabytes of CUDA. The page "Get started" on pytorch.org
# gives the address of the index with the CPU build. `make setup TORCH_INDEX=<that address>` hands it to pip,
# and so does `pip install -r requirements.txt --extra-index-url <that address>`. macOS (14 or newer, Apple
# silicon) and Windows get the CPU build by default.
"""


def main() -> None:
    """Resolve, drop what only a GPU needs, write the file."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(BY_HAND) + "\n")
        command = [
            sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras", "--upgrade",
            "--universal", "--python-version", "3.10", "--constraint", str(constraints),
            "--quiet", "--no-header", "--no-annotate",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    pins = [line for line in done.stdout.splitlines() if line.strip() and not GPU_ONLY.match(line)]
    (ROOT / "requirements.txt").write_text(HEADER + "\n".join(pins) + "\n")
    print(f"requirements.txt: {len(pins)} pins")


if __name__ == "__main__":
    main()
