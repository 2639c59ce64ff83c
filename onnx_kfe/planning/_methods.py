"""Methods of pruning: basis x importance, one shot or in several rounds; and our forms."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_kfe.errors import UsageError
from onnx_kfe.kfe import BASES, IMPORTANCES
from onnx_kfe.planning._direction_forms import DIRECTION_FORMS, DirectionChain

__all__ = ["METHODS", "Method", "find_method"]

_FORMS = "forms"
_CHANNELS = "channels"
_PUBLISHED = ("eigendamage", "eigendamage-depthwise")

METHODS = (_FORMS, _CHANNELS, *_PUBLISHED, *IMPORTANCES)
"""Names: forms and ranks by integer programming; channels by `kron-obs` over what they cost, which measures best;
EigenDamage as published; and any importance alone, in either basis."""


@dataclass(frozen=True)
class Method:
    """What is pruned, and by what.

    Attributes:
        name: As the user types it.
        basis: Key of `BASES`, whose least important directions go; None where forms are chosen by integer programming.
    """

    name: str = _FORMS
    basis: str | None = None

    @property
    def importance(self) -> str:
        """Key of `IMPORTANCES`, of a method that has a basis."""
        if self.form is not None:
            return self.form.importance
        return "kron-obs" if self.name == _CHANNELS else self.name

    @property
    def weighs_costs(self) -> bool:
        """Whether importances count by what is spared."""
        return self.name == _CHANNELS

    @property
    def form(self) -> DirectionChain | None:
        """What a layer becomes in the KFE."""
        if self.basis != "kfe":
            return None
        return DIRECTION_FORMS[self.name if self.name in _PUBLISHED else f"kfe {self.name}"]


def find_method(name: str = _FORMS, basis: str | None = None) -> Method:
    """A method by name; an importance is taken in channel coordinates unless the basis says else.

    Raises:
        UsageError: There is no such method, or the basis does not go with it.
    """
    if name not in METHODS:
        raise UsageError(f"--method {name}: it can be {', '.join(METHODS)}")
    if basis is not None and basis not in BASES:
        raise UsageError(f"--basis {basis}: it can be {', '.join(BASES)}")
    if name not in IMPORTANCES:
        if basis is not None:
            raise UsageError(f"--basis {basis}: it goes with --method {', '.join(IMPORTANCES)}, not with {name}")
        return Method(name, {_FORMS: None, _CHANNELS: "channel"}.get(name, "kfe"))
    basis = basis or "channel"
    if basis not in IMPORTANCES[name].bases:
        raise UsageError(f"--basis {basis}: {name} is defined in {', '.join(IMPORTANCES[name].bases)} only")
    return Method(name, basis)
