"""What specs are made of: frozen parts, and the hash that names them.

The hash covers canonical JSON *without the fields that hold their default*, so that a field added later re-runs
nothing; for the same reason defaults never change (a golden test holds some ids).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

# No whole number of a spec is larger: JSON and MLflow carry larger ones inexactly, and floats not at all.
LARGEST = 2**53

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# Of fields that only place or watch work.
NOT_HASHED: dict[str, Any] = {"hashed": False}

# In ASCII, where no letter looks like another. No part begins with a dot, so that none leads out of a cache.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


def _hub_id(name: str) -> str:
    if not _HUB_NAME.fullmatch(name) or name.count("/") != 1 or len(name) > 96:
        raise ValueError(
            "a data set of the hub must be named owner/name, in at most 96 ASCII letters, digits, '_', '-' and '.', "
            f"neither of the two beginning with '-' or '.', but got {name[:100]!r}"
        )
    return name


def _revision(name: str) -> str:
    if not _HUB_NAME.fullmatch(name) or len(name) > 255:
        raise ValueError(
            "a revision must be a commit, branch or tag, in at most 255 ASCII letters, digits, '_', '-', '.' and '/', "
            f"no part of it beginning with '-' or '.', but got {name[:260]!r}"
        )
    return name


def only_on_hub(hub_id: str) -> str:
    """The name of a hub repository, where the libraries that read it cannot take it for a folder.

    Raises:
        ValueError: If a folder of that name stands in the working directory: they would read that instead.
    """
    if Path(hub_id).exists():
        raise ValueError(
            f"a repository of the hub must not be hidden by a folder, but {hub_id!r} is one in {Path.cwd()}, and would "
            "be read instead; move it away, or name it as a path"
        )
    return hub_id


HubId = Annotated[str, AfterValidator(_hub_id)]
Revision = Annotated[str, AfterValidator(_revision)]


class Part(BaseModel):
    """A frozen part of a spec; unknown fields are refused, so that a typing mistake is never a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _can_be_kept(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"a text must hold no zero byte, which no path and no database takes, but got {value!r}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"a whole number must be within 2**53, but got one of {value.bit_length()} bits")
        return value

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
