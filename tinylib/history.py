"""What a training run did, as plain numbers."""

from dataclasses import dataclass, field

import torch


@dataclass
class History:
    """What a run did: each step's losses by name, the seconds it took, and what was measured after each epoch."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    measured: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def smooth(self, name: str = "loss", window: int = 50) -> list[float]:
        """Return the running mean of a loss over ``window`` steps."""
        values = torch.tensor(self.losses[name])
        window = min(window, len(values))
        return values.unfold(0, window, 1).mean(-1).tolist()

    def record(self, losses: dict[str, float]) -> None:
        """Add a step's losses."""
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
