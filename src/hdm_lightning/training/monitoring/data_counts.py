"""What a stage has seen of its data: samples, passes, holes and quarantined samples."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class DataCounts:
    """Running counts of one stage.

    Attributes:
        pass_samples: samples of one pass over the stage's data.
        quarantine: the run's file of bad samples, one a line.
        holes: samples of the stage so far that could not be used and counted for nothing.
    """

    pass_samples: int
    quarantine: Path
    holes: float = 0.0

    def metrics(self, samples: int) -> dict[str, float]:
        """Scalars after `samples` samples of the stage."""
        return {
            "seen/samples": float(samples),
            "seen/passes": samples / self.pass_samples,
            "seen/holes": self.holes,
            "seen/quarantined": float(self._quarantined()),
        }

    def _quarantined(self) -> int:
        """Different bad samples that the run has met: the same one may be written once by every reader."""
        if not self.quarantine.exists():
            return 0
        return len({line.rpartition(b'"index"')[0] for line in self.quarantine.read_bytes().splitlines()})
