"""Several processes as one run (Hugging Face Accelerate): which one this is, what it owns, who writes and speaks.

``accelerate launch`` and torchrun start a process for each GPU, or for each share of the CPU cores, and tell it so in the
environment. Without them there is one process, and nothing here costs anything; torch is imported only where it is used.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

from tinylib.errors import UserError

PATIENCE = timedelta(hours=12)  # that one process may wait for another: making a cache can take hours
REMEDY = "unset WORLD_SIZE to run one process, or start several with torchrun or accelerate launch --multi_gpu, which set it"


def count() -> int:
    """Return the number of processes of this run; raises UserError for an environment that makes no sense."""
    return _told()[1]


def index() -> int:
    """Return this process's number, from 0; raises UserError as ``count`` does."""
    return _told()[0]


def _told() -> tuple[int, int]:
    """Return what the environment says: this process's number and how many there are.

    Raises UserError where it makes no sense: a WORLD_SIZE that is no number, or that stands there without what a launcher sets
    beside it (a pod's environment may hold one), or a RANK that is none of the run's.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if said == "1":
        return 0, 1
    if not _is_number(said) or int(said) < 1:
        raise UserError(f"WORLD_SIZE={said!r} is no number of processes; {REMEDY}")
    missing = [name for name in ("RANK", "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={said} means several processes, but there is no {' and no '.join(missing)}; {REMEDY}")
    rank = os.environ["RANK"]
    if not _is_number(rank) or int(rank) >= int(said):
        raise UserError(f"RANK={rank!r} is none of the numbers from 0 that WORLD_SIZE={said} processes have; {REMEDY}")
    return int(rank), int(said)


def _is_number(said: str) -> bool:
    return said.isascii() and said.isdigit()


def is_main() -> bool:
    """Tell whether this process is the one that writes and speaks; where the environment is wrong, each one may say so."""
    try:
        return index() == 0
    except UserError:
        return True


def start() -> None:
    """Join the run's other processes (PyTorch's process group: NCCL on GPUs, gloo on CPUs); a second call does nothing.

    Raises UserError if Accelerate finds another number of processes than WORLD_SIZE says.
    """
    if count() > 1:
        import torch

        # once imported it keeps the group of that moment as the default of its functions; then gloo's threads outlive the group,
        # and one that gives a tensor back while Python ends aborts the process after all its work. Here there is no group yet.
        import torch.distributed.nn
        from accelerate.state import PartialState

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
        if cpu:  # a launcher of several processes leaves it unset; accelerate launch --cpu, which sets it, starts one process
            os.environ["ACCELERATE_USE_CPU"] = "true"
        found = PartialState(cpu=cpu, timeout=PATIENCE).num_processes
        if found != count():
            raise UserError(f"WORLD_SIZE={count()}, but Accelerate found {found}; {REMEDY}")


def stop() -> None:
    """Leave the run: without it PyTorch complains at the end of the process."""
    if count() > 1:
        from accelerate.state import PartialState

        PartialState().destroy_process_group()


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        from accelerate.state import PartialState

        start()
        PartialState().wait_for_everyone()


def owned(rows: Sequence[int]) -> list[int]:
    """Return those of the rows that this process works on: row r belongs to process r mod P, in every epoch and on every step.

    So a process reads the same share of the data all along and keeps the teacher's outputs of that share only.
    """
    own, processes = _told()
    return [row for row in rows if row % processes == own] if processes > 1 else list(rows)
