"""What the configurations of all adapters of sparse weights share."""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from peft import PeftConfig

from gossamer.adapters._linear import Adapter
from gossamer.core.errors import GossamerError


class Method(str, Enum):  # noqa: UP042 (peft prints the part after the dot, which a StrEnum does not write)
    """The names of the adapters in peft: strings, as in adapter_config.json, with the ``value`` that peft asks for."""

    MASKLORA = "MASKLORA"
    SCALELORA = "SCALELORA"
    LORAPRUNE = "LORAPRUNE"
    SPP = "SPP"
    PST = "PST"


@dataclass
class SparseConfig(PeftConfig):  # type: ignore[misc]
    """What the configurations of all adapters share; ``method`` is its name in peft, ``adapter`` the class that computes it."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    method: ClassVar[Method]
    adapter: ClassVar[type[Adapter]]

    def __new__(cls, *args: Any, **given: Any) -> Any:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            takes = sorted(known - {field.name for field in fields(PeftConfig)})
            raise GossamerError(f"{cls.__name__} takes {', '.join(takes)}, not {', '.join(unknown)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


def check_rank(r: int) -> None:
    """Raise GossamerError if a rank is none."""
    if not isinstance(r, int) or r < 1:
        raise GossamerError(f"the rank r is a whole number of at least 1, not {r!r}")


@dataclass
class LowRankConfig(SparseConfig):
    """What a low-rank update s·BA takes, s = alpha / r."""

    r: int = 16
    alpha: float = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r)
