"""What all sections of the configuration are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, SerializationInfo

from pdserve.core.admission import LEAST_URGENT, MOST_URGENT

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Priority = Annotated[int, Field(ge=MOST_URGENT, le=LEAST_URGENT)]


class Section(BaseModel):
    """Frozen; refuses unknown keys, silent conversions and infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def shown(secret: SecretStr, info: SerializationInfo) -> str:
    """In clear only to whoever asks for it."""
    return secret.get_secret_value() if info.context and info.context.get("reveal") else str(secret)
