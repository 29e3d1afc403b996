"""What specs are made of: frozen parts, and the hash that names them.

The hash covers canonical JSON *without the fields that hold their default*, so that a field added later re-runs
nothing; for the same reason defaults never change (a golden test holds some ids).
"""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# Of fields that only place or watch work.
NOT_HASHED: dict[str, Any] = {"hashed": False}


class Part(BaseModel):
    """A frozen part of a spec; unknown fields are refused, so that a typing mistake is never a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def canonical(self) -> "Part":
        """The same thing in the one spelling that is hashed."""
        return self


def identity_of(part: Part) -> dict[str, Any]:
    """The hashed fields that differ from their default, as plain JSON values."""
    part = part.canonical()
    identity: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("hashed") is False:
            continue
        value = getattr(part, name)
        if isinstance(value, Part):
            # An optional part that is set says something even when all its own fields hold their defaults.
            if (inner := identity_of(value)) or field.default is None:
                identity[name] = inner
        elif value != field.default:
            identity[name] = value
    return identity


def canonical_json(identity: dict[str, Any]) -> str:
    """The one spelling of an identity that is hashed."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(canonical: str) -> str:
    """12 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
