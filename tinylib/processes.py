"""Several processes as one run (Hugging Face Accelerate): which one this is, what it owns, who writes and speaks.

``accelerate launch`` and torchrun start a process for each GPU, or for each share of the CPU cores, and tell it so in the
environment. Without them there is one process, and nothing here costs anything; torch is imported only where it is used.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

from tinylib.errors import UserError

PATIENCE = timedelta(hours=12)  # that one process may wait for another: making a cache can take hours


def count() -> int:
    """Return the number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return index() == 0


def start() -> None:
    """Join the run's other processes (PyTorch's process group: NCCL on GPUs, gloo on CPUs); a second call does nothing.

    Raises UserError if Accelerate finds another number of processes than WORLD_SIZE says.
    """
    if count() > 1:
        import torch
        from accelerate.state import PartialState

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.cuda.is_available()
        if cpu:  # what accelerate launch --cpu sets; torchrun does not
            os.environ["ACCELERATE_USE_CPU"] = "true"
        found = PartialState(cpu=cpu, timeout=PATIENCE).num_processes
        if found != count():
            raise UserError(f"WORLD_SIZE={count()}, but Accelerate found {found} processes; start them with accelerate launch")


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
    return [row for row in rows if row % count() == index()] if count() > 1 else list(rows)
