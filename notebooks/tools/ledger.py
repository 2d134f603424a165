"""Ship this machine's ledger with the course: what its lessons measured here becomes data/results/ledger.json.

    python notebooks/tools/ledger.py

Run the lessons first, one after the other, on a quiet machine: latencies are only comparable within one.
"""

import json
import sys

from tinylib import course, datasets, ledger

WANTED = {"00", "03", "04", "05", "08", "09", "10"}


def main() -> int:
    """Write the laptop tier's rows; refuse if a lesson has not been run."""
    rows = ledger.rows(course.LAPTOP.data, course.LAPTOP.name)
    missing = sorted(WANTED - {row["lesson"] for row in rows} - {"03"})  # 09 measures 03's teacher again
    if missing:
        print(f"run the lessons {', '.join(missing)} first: the ledger has nothing of them")
        return 1
    rounded = [row | {k: round(row[k], 4) for k in ("accuracy", "megabytes", "milliseconds")} for row in rows]
    file = datasets.data_folder() / "results" / "ledger.json"
    file.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
    print(f"{file.name}: {len(rows)} models")
    return 0


if __name__ == "__main__":
    sys.exit(main())
