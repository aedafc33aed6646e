"""The optimizer's fields, for commands that reckon with a training and run none."""

from hdm_lightning.errors import UserError
from hdm_lightning.training.optimization.parameter_groups import RULES
from hdm_lightning.training.settings import OptimizerSettings

KINDS = ("adamw", "muon")


def check_optimizer(settings: OptimizerSettings) -> None:
    """Kind, rule and figures make sense.

    Raises:
        UserError: naming the key under `optimizer`.
    """
    for key, value, known in (("name", settings.name, KINDS), ("rule", settings.rule, tuple(RULES))):
        if value not in known:
            raise UserError(
                f"'{value}' is none of {', '.join(known)}", where=f"optimizer.{key}", hint=f"optimizer.{key}={known[0]}"
            )
    if not 0 <= settings.muon_momentum < 1:
        raise UserError(
            f"{settings.muon_momentum} is not in [0, 1)", where="optimizer.muon_momentum", hint="0.95 is usual"
        )
    if settings.muon_rounds < 1:
        raise UserError(f"{settings.muon_rounds} is below 1", where="optimizer.muon_rounds", hint="5 is usual")
