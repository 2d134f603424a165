"""Audit the pinned dependencies for known vulnerabilities: `make audit`.

pip-audit, in an environment of its own (.venv-audit, so that it moves no pin), asks PyPI's advisory service about each version
in requirements.txt that holds on this Python and system. Exit codes: 0 every version was looked up and none is known to be
vulnerable, 1 some are (they are listed), 3 the service did not answer for all of them, which proves nothing either way.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOL = "pip-audit==2.10.1"
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def main() -> int:
    """Run the audit, print what it found in a few lines, and return the exit code."""
    try:
        code, report = verdict(*ask(ROOT / "requirements.txt"))
    except (OSError, subprocess.CalledProcessError) as error:
        code, report = UNKNOWN, f"{TOOL} could not be installed or run ({error}): connect to the internet, then make audit again"
    print(report, file=sys.stderr if code else sys.stdout)
    return code


def ask(requirements: Path) -> tuple[str, str]:
    """Return what pip-audit prints (JSON) and what it complains of."""
    place = ROOT / ".venv-audit"
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    if not (programs / "pip-audit").exists() and not (programs / "pip-audit.exe").exists():
        venv.create(place, with_pip=True, clear=True)
        command = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TOOL]
        subprocess.run(command, check=True)
    # every package is pinned, so there is nothing to resolve, and nothing of them is downloaded
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([programs / "pip-audit", "-r", requirements, *options], capture_output=True, text=True)
    return done.stdout, done.stderr


def verdict(answer: str, complaint: str) -> tuple[int, str]:
    """Return the exit code and what to print for what pip-audit answered."""
    try:
        found = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        why = (complaint.strip().splitlines() or ["no answer"])[-1][:300]
        return UNKNOWN, f"the advisory service does not answer ({why}): nothing was audited; try again with internet"
    bad = [
        f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for package in found for hole in package.get("vulns", [])
    ]  # fmt: skip
    silent = sorted(package["name"] for package in found if "skip_reason" in package)
    if bad:
        return VULNERABLE, "\n".join([*bad, f"{len(bad)} known vulnerabilities: raise the versions (make pins) and test again"])
    if silent or not found:
        some = ", ".join(silent[:3])
        what = f"{len(silent)} of {len(found)} packages ({some}, …)"
        return UNKNOWN, f"the advisory service does not know {what}, so these were not audited; try again with PyPI itself"
    return CLEAN, f"{len(found)} pinned packages, none of them with a known vulnerability"


if __name__ == "__main__":
    sys.exit(main())
