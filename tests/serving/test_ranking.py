"""Ids in, scores out, through a real Triton and a real online store."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.request import urlopen

import numpy as np
import polars as pl
import pytest
from ranking_world import RUN_DATE, RankingWorld, noon

from freshrank.errors import ServingError
from freshrank.frames import Frame
from freshrank.serving.bundle import Tensors
from freshrank.serving.client import Answer, Client, TritonClient
from freshrank.serving.protocol import MAX_CANDIDATES, OUTPUTS
from freshrank.serving.publish import publish, rollback
from freshrank.serving.ranking import BadRequest, NothingPublished, Query, RankingService
from freshrank.serving.repository import ModelRepository
