"""Run lessons under nbval, several at a time (`make test`): every cell runs, and what must come out the same is compared.

Derivations must come out the same everywhere; training results differ in the last digits, so the other lessons are run to the
end and only the cells tagged nbval-check-output are compared. A lesson that waits for another one's teacher is no loss: the
cache makes it once. What stands after "--" is handed on to pytest.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lessons import ROOT, STRICT, lessons

# The longest first, so that none begins when the others are done; 03 makes the teacher, 09 the student that 10 takes.
FIRST, LAST = ("03_", "09_", "08_", "07_"), "10_"
PATIENCE = 3000  # seconds that a cell may take: on a slow machine the teacher is made in one, and another lesson waits for it


def main() -> int:
    """Run the lessons; return 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 1))), help="lessons at a time")
    parser.add_argument("lessons", nargs="*", type=Path, metavar="LESSON", help="all, if none is named")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, more = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    chosen = sorted(args.lessons or lessons(), key=_turn)
    jobs = min(args.jobs, len(chosen))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    failed = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(_run, lesson, threads, more): lesson for lesson in chosen}
        for done in concurrent.futures.as_completed(runs):
            code, said, seconds = done.result()
            print(f"\n{runs[done].name}: {seconds:.0f} s on {threads} thread{'s' * (threads > 1)}\n{said}", flush=True)
            if code:
                failed.append(runs[done].name)
    print(f"lessons: {len(chosen) - len(failed)} passed, {len(failed)} failed{': ' * bool(failed)}{', '.join(sorted(failed))}")
    return int(bool(failed))


def _turn(lesson: Path) -> tuple[int, str]:
    places = [n for n, start in enumerate(FIRST) if lesson.name.startswith(start)]
    usual = len(FIRST) + lesson.name.startswith(LAST)
    return (places[0] if places else usual, lesson.name)


def _run(lesson: Path, threads: int, more: list[str]) -> tuple[int, str, float]:
    """Run one lesson; return pytest's exit code, what it said, and the seconds it took."""
    mode = "--nbval" if lesson.name.startswith(STRICT) else "--nbval-lax"
    rules = ["--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg", f"--nbval-cell-timeout={PATIENCE}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", *rules, "--durations=5", mode, *more, str(lesson)]
    # TQDM_MININTERVAL: nbval reads a cell's messages after the cell, and of more than about 2,000 the rest are lost, the one
    # that says "done" among them; a progress bar that is drawn ten times a second sends that many in a minute.
    told = {"TQDM_MININTERVAL": "5", "TINYLIB_TYPECHECK": "1", "TINYLIB_TIER": "laptop", "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | told, stdout=log, stderr=subprocess.STDOUT).returncode
        log.seek(0)
        return code, log.read(), time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
