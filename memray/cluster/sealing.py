"""Secrets on their way to a job, sealed with the cluster's token: Ray's agents log the environment of every job.

Whoever holds the token may run code on the cluster, and so may read them; nobody else can.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

# The variable that holds the others.
SEALED = "MEMRAY_SEALED"


def seal(secrets: Mapping[str, str]) -> dict[str, str]:
    """Variables that hold these; as they are, where there is no token to seal them with."""
    token = _token()
    if not secrets or token is None:
        return dict(secrets)
    return {SEALED: _box(token).encrypt(json.dumps(dict(secrets)).encode()).decode()}


def unseal() -> None:
    """Gives this process what it was sent sealed.

    Raises:
        ValueError: If it has another token than the sender.
    """
    sealed, token = os.environ.pop(SEALED, None), _token()
    if sealed is None:
        return
    from cryptography.fernet import InvalidToken

    try:
        os.environ.update(json.loads(_box(token or "").decrypt(sealed)))
    except InvalidToken as error:
        raise ValueError(
            "a job must have the token with which its secrets were sealed, but this process has "
            f"{'none' if token is None else 'another'}; set RAY_AUTH_TOKEN, or ~/.ray/auth_token, to the same on every "
            "node"
        ) from error


def _token() -> str | None:
    """The token of Ray's clusters, from where Ray takes it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


def _box(token: str):
    from cryptography.fernet import Fernet  # of MLflow's own requirements

    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(b"memray " + token.encode()).digest()))
