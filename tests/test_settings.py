"""Settings come from the environment; what cannot be is said in one line, secrets are not."""

import pytest
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from freshrank.errors import ConfigError
from freshrank.orchestration.kubeflow.settings import ApiSettings, ClusterSettings
from freshrank.settings import Settings, as_env_file, from_environment, redis_host, settings, unknown_variables


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


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://cache:6379/0", "expected host:port and options"),
        ("cache", "expected host:port and options"),
        ("cache:6379,password=hun,ter2", "nor a comma in a password"),
        ("cache:6379,passwort=hunter2", "there is one named 'passwort'"),
    ],
)
def test_an_address_of_redis_that_feast_cannot_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, expected: str
) -> None:
    """Before anything is computed, and without repeating it."""
    monkeypatch.setenv("FRESHRANK_REDIS_URL", url)
    with pytest.raises(ConfigError) as refused:
        from_environment(Settings)
    assert str(refused.value).startswith("FRESHRANK_REDIS_URL: received a secret, ")
    assert expected in str(refused.value)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["cache:6379", "10.0.0.1:6380,db=1,ssl=true,ssl_ca_certs=/etc/ca.pem,password=a=b"])
def test_an_address_of_redis_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """A password may hold an equals sign."""
    monkeypatch.setenv("FRESHRANK_REDIS_URL", url)
    assert Settings().redis_url.get_secret_value() == url


def test_the_host_is_told_without_the_password_wherever_it_stands() -> None:
    """Feast takes the options in any order."""
    assert redis_host(SecretStr("password=hunter2,cache:6379,db=0")) == "cache:6379"


def test_a_mapping_that_is_no_json_is_named_with_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret's reference, which may be the secret itself by mistake, is not repeated."""
    monkeypatch.setenv("FRESHRANK_CLUSTER_NODE_SELECTOR", "gpu=true")
    with pytest.raises(ConfigError, match=r"CLUSTER_NODE_SELECTOR: received 'gpu=true', expected JSON such as \{"):
        from_environment(ClusterSettings)
    monkeypatch.delenv("FRESHRANK_CLUSTER_NODE_SELECTOR")
    monkeypatch.setenv("FRESHRANK_CLUSTER_SECRET_ENV", "hunter2")
    with pytest.raises(ConfigError, match="CLUSTER_SECRET_ENV: received a value that is not repeated here"):
        from_environment(ClusterSettings)


def test_a_variable_that_nothing_reads_is_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most likely a misspelling."""
    monkeypatch.setenv("FRESHRANK_CLUSTER_GPU", "1")
    told = unknown_variables(Settings, ClusterSettings)
    assert "FRESHRANK_CLUSTER_GPU: no setting reads it; did you mean FRESHRANK_CLUSTER_GPUS?" in told
    assert not [each for each in told if each.startswith("FRESHRANK_HOME")]


def test_settings_are_shown_as_an_env_file_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set stands as it is, what is not is commented out with its default; the line above says what it is."""
    monkeypatch.setenv("FRESHRANK_REDIS_URL", "redis.local:6379,password=hunter2")
    monkeypatch.setenv("FRESHRANK_ITEM_CACHE_SECONDS", "5")
    monkeypatch.delenv("FRESHRANK_ONLINE_STORE", raising=False)
    lines = list(as_env_file(Settings))
    place = lines.index("FRESHRANK_ITEM_CACHE_SECONDS=5.0")
    assert lines[place - 1].startswith("# How long the server answers from an item's features")
    assert "# FRESHRANK_ONLINE_STORE=sqlite" in lines
    assert "FRESHRANK_REDIS_URL=a secret that is not shown" in lines
    assert "hunter2" not in "".join(lines)


@pytest.mark.parametrize("kind", [Settings, ClusterSettings, ApiSettings])
def test_every_setting_is_shown(kind: type[BaseSettings]) -> None:
    """Once, and none without a word on what it means."""
    shown = [line.lstrip("# ").partition("=")[0] for line in as_env_file(kind) if "=" in line]
    prefix = str(kind.model_config["env_prefix"])
    assert [name for name in shown if name.startswith(prefix)] == [prefix + name.upper() for name in kind.model_fields]
    assert [name for name, field in kind.model_fields.items() if not field.description] == []
