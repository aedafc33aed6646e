"""A Lightning logger for trackio, which keeps a run's metrics in files on this machine or in a Space."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from hdm_lightning.errors import UserError


class TrackioLogger(Logger):
    """Log metrics and images to trackio (`pip install trackio`; `trackio show` opens its page).

    Args:
        project: project that the run belongs to.
        name: name of the run; an existing run of this name is continued.
        options: other arguments of `trackio.init`, such as `space_id`.

    Raises:
        UserError: the package trackio is missing.
    """

    def __init__(self, project: str, name: str | None = None, **options: Any) -> None:
        super().__init__()
        if find_spec("trackio") is None:
            raise UserError("needs the package trackio", where="logger.trackio", hint="pip install trackio")
        self._project, self._name, self._options = project, name, options
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name."""
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The trackio run, started at first use."""
        if self._run is None:
            import trackio  # noqa: PLC0415  (an extra)

            self._run = trackio.init(project=self._project, name=self._name, resume="allow", **self._options)
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a run's settings are in its config.yaml."""

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Image.Image], step: int | None = None) -> None:
        """Log images under one name, with the signature of Lightning's WandbLogger."""
        import trackio  # noqa: PLC0415  (an extra)

        names = [key] if len(images) == 1 else [f"{key}/{number}" for number in range(len(images))]
        self.experiment.log(dict(zip(names, map(trackio.Image, images), strict=True)), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; a later stage continues the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
