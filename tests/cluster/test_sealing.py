"""What a job is sent sealed, only a holder of the cluster's token can read."""

import os
from pathlib import Path

import pytest

from memray.cluster.sealing import SEALED, seal, unseal

SECRETS = {"HF_TOKEN": "a secret", "MLFLOW_TRACKING_URI": "http://me:password@server"}


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token, and none of the secrets."""
    for name in (*SECRETS, SEALED, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("the token\n")
    return tmp_path


def test_what_was_sealed_is_read_with_the_same_token_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal(SECRETS)
    assert {*sealed} == {SEALED}
    assert not any(secret in sealed[SEALED] for secret in SECRETS.values())
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the token")
    monkeypatch.setenv("HOME", "/nowhere")
    os.environ.update(sealed)
    unseal()
    assert SECRETS.items() <= os.environ.items()
    assert SEALED not in os.environ
    unseal()


def test_another_token_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.update(seal(SECRETS))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(ValueError, match="this process has another; set RAY_AUTH_TOKEN"):
        unseal()
    assert "HF_TOKEN" not in os.environ


def test_without_a_token_nothing_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seal({}) == {}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert seal(SECRETS) == SECRETS
