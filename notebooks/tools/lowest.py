"""Run the fast tests with the oldest packages that pyproject.toml allows (`make test-lowest`).

Makes .venv-lowest, once, with each direct dependency at its lower bound, and runs the tests that need neither a network, nor a
browser, nor much time. torch is the exception: it stays at the pinned version, since the older ones' wheels on PyPI bring
gigabytes of CUDA; how its own lower bound was chosen stands beside it in pyproject.toml.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".venv-lowest"
FAST = "not slow and not network and not browser and not alone"
# The lessons and the set-up are for the pinned environment; the fuzzers and the tables of bad files take minutes.
LEFT_OUT = (
    "setup", "notebooks", "browser", "colab", "fuzz", "bad_checkpoints", "robust", "benchmarks", "security", "data", "course",
)  # fmt: skip
ELSEWHERE = "tests/test_doctor.py::test_a_machine_like_this_one_is_fine"  # doctor rightly says that this is not .venv


def lowest() -> list[str]:
    """Return each direct dependency of the package, its extras and its tests at its lower bound, torch at its pin."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    lists = re.findall(r"(?ms)^(?:dependencies|lab|export|logs|test) = \[\n(.*?)^\]", project)
    bounds = [text for block in lists for text in re.findall(r'(?m)^    "(.*?)",', block)]
    pinned = [text.replace(">=", "==", 1) for text in bounds if not text.startswith("torch>=")]
    return [re.search(r"(?m)^torch==\S+", pins)[0], *pinned]


def main() -> int:
    """Make the environment if it is not there for these bounds, run the tests in it, and return their exit code."""
    wanted, stamp = "\n".join(lowest()) + "\n", PLACE / "wanted.txt"
    python = PLACE / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"Making {PLACE.name} with the oldest packages that pyproject.toml allows (a few minutes) ...", flush=True)
        venv.create(PLACE, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "lowest.txt")
            file.write_text(wanted, encoding="utf-8")
            subprocess.run([*install, "-r", str(file)], check=True)
        subprocess.run([*install, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)
        stamp.write_text(wanted, encoding="utf-8")
    left_out = [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
    command = [str(python), "-m", "pytest", "-q", "-m", FAST, *left_out, "--deselect", ELSEWHERE, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
