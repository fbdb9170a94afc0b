"""The baseline a team would write without freshrank's serving: FastAPI, Feast's client, onnxruntime in process.

``python -m freshrank.bench.serving.fastapi_server --bundle DIR --home DIR --port N``. Same bundle, store and encoder;
JSON in and out; one worker process per core.
"""

import argparse
import os
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from freshrank.bundle.onnx_ranker import OnnxRanker
from freshrank.datasets.dataset import Dataset
from freshrank.features.encoder import Catalog
from freshrank.features.frames import serving_frame
from freshrank.features.store import FeatureStore
from freshrank.schema import SEQUENCE_ITEMS
from freshrank.serving.deploy.local_server import LOOPBACK
from freshrank.storage.workspace import Workspace

BUNDLE, HOME = "FRESHRANK_BENCH_BUNDLE", "FRESHRANK_BENCH_HOME"


class RankingRequest(BaseModel):
    """One user and candidates."""

    user_id: int
    item_ids: list[int]
    at_us: int


class Service:
    """Holds the model and the store of one worker."""

    def __init__(self, bundle: Path, home: Path) -> None:
        self.ranker = OnnxRanker(bundle, threads=1)
        schema = self.ranker.encoder.schema
        self.store = FeatureStore(Dataset(Path(), schema, {}), Workspace.of(schema.name, home))

    def rank(self, request: RankingRequest) -> dict[str, Any]:
        at = datetime.fromtimestamp(request.at_us / 1e6, UTC)
        frame = serving_frame(self.store, request.user_id, request.item_ids, at)
        sequence = frame.users[SEQUENCE_ITEMS].explode().drop_nulls().unique().to_list()
        catalog = Catalog.build(self.store.online_items(sequence), self.ranker.encoder)
        answer = self.ranker.run(self.ranker.encoder.inputs(frame, catalog))
        return {"score": answer["score"].tolist(), "probabilities": answer["probabilities"].tolist()}


services: dict[str, Service] = {}


@asynccontextmanager
async def lifespan(app: FastAPI) -> Any:
    """Open everything before the first request."""
    services["ranking"] = Service(Path(os.environ[BUNDLE]), Path(os.environ[HOME]))
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/rank")
def rank(request: RankingRequest) -> dict[str, Any]:
    """In FastAPI's thread pool, as a blocking client of a store has to be."""
    return services["ranking"].rank(request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--home", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    os.environ |= {BUNDLE: given.bundle, HOME: given.home}
    uvicorn.run(
        "freshrank.bench.serving.fastapi_server:app",
        host=LOOPBACK,
        port=given.port,
        workers=given.workers,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
