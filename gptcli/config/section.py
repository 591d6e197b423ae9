"""What every section of the configuration is made of: strict, bounded values, errors with a key."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

# No setting is larger: sums and products of a few of these stay far from the ends of 64 bits and
# of a float's exponent. Not said where the kinds of values are listed; everything else is.
MOST = 10**12
_MOST_NAME_BYTES, _MOST_PATH_BYTES = 255, 4095  # what file systems and Linux take


def _integral(value: Any) -> Any:
    """Let 1e9 and 1.0e5 stand for integers; leave everything else to the strict check."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def is_utf8(text: str) -> bool:
    """Tell whether `text` has no half of a character; file names that are not UTF-8 do."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_path(value: str) -> str:
    """Return `value` unless no file system takes it as a path.

    Raises:
        PydanticCustomError: It is none, which is a ValueError that says what is expected.
    """
    if not is_utf8(value) or "\0" in value:
        raise PydanticCustomError("path", "a path in UTF-8 without NUL")
    names = value.encode().replace(b"\\", b"/").split(b"/")
    if len(value.encode()) > _MOST_PATH_BYTES or max(map(len, names)) > _MOST_NAME_BYTES:
        most = f"{_MOST_PATH_BYTES} bytes, each name in it of at most {_MOST_NAME_BYTES}"
        raise PydanticCustomError("path", f"a path of at most {most}")
    return value


Int = Annotated[int, BeforeValidator(_integral)]
PositiveInt = Annotated[int, BeforeValidator(_integral), Field(gt=0, le=MOST)]
Size = Annotated[int, BeforeValidator(_integral), Field(gt=0, le=2**20)]
"""Of one dimension: rows, widths, vocabularies."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=MOST)]
PathText = Annotated[str, AfterValidator(require_path)]
"""A path, or a name that a path could be taken for."""


def clipped(text: str) -> str:
    """Return the beginning of a text, enough of it to know it by."""
    return text if len(text) <= 60 else f"{text[:60]}..."


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
