"""Settings come from the environment; what cannot be is said in one line, secrets are not."""

import pytest

from freshrank.errors import ConfigError
from freshrank.settings import Settings, settings


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "REQUEST_LOG_SHARE",
            "2",
            "FRESHRANK_REQUEST_LOG_SHARE: received '2', Input should be less than or equal to 1",
        ),
        ("ONLINE_STORE", "mysql", "FRESHRANK_ONLINE_STORE: received 'mysql', Input should be 'sqlite' or 'redis'"),
        ("TRITON_GRPC_PORT", "grpc", "FRESHRANK_TRITON_GRPC_PORT: received 'grpc', Input should be a valid integer"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """The variable, what it held, and what was expected; the command line then ends with exit code 2."""
    monkeypatch.setenv(f"FRESHRANK_{name}", value)
    settings.cache_clear()
    with pytest.raises(ConfigError) as error:
        settings()
    settings.cache_clear()
    assert sentence in str(error.value)
    assert error.value.exit_code == 2


def test_secrets_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the settings themselves nor where another one is wrong."""
    monkeypatch.setenv("FRESHRANK_REDIS_URL", "redis.local:6379,password=hunter2")
    assert "hunter2" not in repr(Settings())
