"""What every section of the configuration is made of: strict values, and errors with a key."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _integral(value: Any) -> Any:
    """Let 1e9 and 1.0e5 stand for integers; leave everything else to the strict check."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_integral)]
PositiveInt = Annotated[int, BeforeValidator(_integral), Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def invalid(key: str, message: str, *others: str) -> PydanticCustomError:
    """Make the error of a check across keys; the loader finds the line of the first that is set."""
    context = {"reason": message, "key": key, "others": others}
    return PydanticCustomError("cross_check", "{reason}", context)


class Section(BaseModel):
    """What every section shares: unknown keys, NaN and silent conversions are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
