"""`pip install freshrank` in a web server: its client against a real Triton, where nothing else is installed."""

import json
from pathlib import Path

import polars as pl
import pytest
from ranking_world import RUN_DATE, RankingWorld, noon

from freshrank.serving.client import Client
from freshrank.settings import settings
from tests.wheel.environments import Environment, build_wheel

RANK = """
import json, sys
from freshrank.serving.client import Client
data, user, items, at = json.loads(sys.argv[1])
with Client.for_dataset(data) as client:
    answer = client.rank(user, items, at)
print(json.dumps({"rows": answer.rows(), "loaded": sorted({"torch", "polars", "pandas"} & set(sys.modules))}))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Only what the base install asks for."""
    folder: Path = tmp_path_factory.mktemp("installed")
    return Environment.create(folder / "bare", build_wheel(folder)).link("freshrank")


def test_the_base_install_ranks_through_the_client(bare: Environment, world: RankingWorld) -> None:
    """Against a real server it gives the answer that everything installed gives, and loads no torch for it."""
    items = [str(number) for number in world.dataset.items()["item_id"].head(20)] + ["987654321"]
    asked = (str(world.data), "7", items, noon(RUN_DATE))
    result = bare.run("-c", RANK, json.dumps(asked), FRESHRANK_TRITON_GRPC_PORT=str(settings().triton_grpc_port))
    assert result.returncode == 0, result.stderr
    with Client.for_dataset(world.data) as client:
        expected = client.rank("7", items, noon(RUN_DATE)).rows()
    answer = json.loads(result.stdout)
    assert answer["loaded"] == []
    assert answer["rows"] == json.loads(json.dumps(expected))


def test_the_command_line_ranks_in_the_base_install(bare: Environment, world: RankingWorld) -> None:
    """It is the client with options."""
    arguments = ["--data", str(world.data), "--user", "7", "--candidates", "1,2,3", "--json"]
    result = bare.run(
        "-m", "freshrank", "rank", *arguments, FRESHRANK_TRITON_GRPC_PORT=str(settings().triton_grpc_port)
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_ids_that_are_text_are_mapped_in_the_base_install(bare: Environment, tmp_path: Path) -> None:
    """A log's own ids are strings more often than not."""
    pl.DataFrame({"value": ["a", "b"], "code": [0, 1]}).write_parquet(tmp_path / "item_id.parquet")
    program = "import sys; from pathlib import Path; from freshrank.serving.client import Codes\n"
    program += "print(Codes(Path(sys.argv[1])).id('item_id', 'b'))"
    result = bare.run("-c", program, str(tmp_path))
    assert result.stdout.strip() == "1", result.stderr
