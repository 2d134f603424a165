"""A finished run for TensorBoard: the losses of each step, what was measured on the way, and the result.

Written from the histories, which a resumed run keeps whole. The package ``tensorboard`` is needed and comes with
``pip install tinylib[logs]``.
"""

from collections.abc import Mapping
from pathlib import Path

from tinylib import models
from tinylib.errors import UserError
from tinylib.history import History


def check(folder: str | Path, out: str | Path) -> Path:
    """Return the folder for the logs, or say before the run why nothing can be written there.

    It may not lie inside the output folder, which is replaced as a whole. Raises UserError if it does, if it is a file, and if
    TensorBoard is not installed.
    """
    _writer()
    folder, out = models.expanded(folder).resolve(), models.expanded(out).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--tensorboard {folder} is a file; name a folder")
    if folder == out or out in folder.parents:
        raise UserError(f"--tensorboard {folder} lies inside --out, which is replaced as a whole; name a folder beside it")
    return folder


def write(folder: Path, histories: Mapping[str, History], report: Mapping[str, object]) -> None:
    """Write the losses of each step as ``<history>/<loss>``, what was measured, and the report's numbers as ``result/<name>``.

    Raises UserError if TensorBoard is not installed or the folder cannot be written.
    """
    try:
        with _writer()(str(folder)) as log:
            for name, history in histories.items():
                _write_history(log, name, history)
            for name, value in report.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    log.add_scalar(f"result/{name}", value, 0)
    except OSError as error:
        raise UserError(f"--tensorboard {folder} cannot be written ({error.strerror or error}); name another folder") from error


def _write_history(log, name: str, history: History) -> None:
    steps = max(map(len, history.losses.values()), default=0)
    for loss, values in history.losses.items():
        for step, value in enumerate(values, start=1):
            log.add_scalar(f"{name}/{loss}", value, step)
    for n, measured in enumerate(history.measured, start=1):
        # a run by epochs measures after each of them and does not say at which step that was
        step = int(measured.get("step", round(n * steps / len(history.measured))))
        for figure, value in measured.items():
            if figure != "step":
                log.add_scalar(f"{name}/{figure}", value, step)


def _writer():
    """Return torch's SummaryWriter; raise UserError with pip's line where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # also of something that tensorboard needs
        remedy = "python -m pip install tensorboard"
        raise UserError(f"the package tensorboard is missing, which --tensorboard needs; {remedy}") from None
    return SummaryWriter
