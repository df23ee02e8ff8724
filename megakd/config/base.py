"""What every section of a configuration is made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# 2e9 is how people write token counts; JSON reads it as a float.
Count = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v)]


def mutable(default: Any, **constraints: Any) -> Any:
    """A field that may change after the run was made; the change is recorded in history.jsonl."""
    return Field(default, json_schema_extra={"mutable": True}, **constraints)


class Section(BaseModel):
    """Frozen; a key that is no field is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
