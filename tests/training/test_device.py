"""What a training computes with is what its configuration says, on every run."""

import pytest
import torch

from freshrank.config import TechniquesConfig, TrainingConfig
from freshrank.recipes import RECIPES, named, recipe
from freshrank.training.batches import Encoded
from freshrank.training.loop import train_encoded
from tests.models.test_ranker import FRAME, SCHEMA, SMALL, TRAINING


@pytest.mark.integration
def test_the_same_configuration_gives_the_same_ranker_in_the_precision_it_names() -> None:
    """bfloat16 twice, float32 once, on the CPU."""
    encoded, found = Encoded.of(FRAME, FRAME.items, SCHEMA, 1), []
    for precision in ("bfloat16", "bfloat16", "float32"):
        training = TRAINING.model_copy(update={"device": "cpu", "precision": precision})
        found.append(train_encoded(encoded, SMALL, TechniquesConfig(), training))
        assert precision in str(found[-1].facts["device"])
    one, again, other = (each.ranker.state_dict() for each in found)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"precision": "auto", "compile": "auto"}, TrainingConfig()),
        ({"compile": "off"}, TrainingConfig()),
        ({"precision": "bfloat16", "compile": "on"}, TrainingConfig(precision="bfloat16", compile=True)),
    ],
)
def test_what_older_releases_wrote_is_read(written: dict[str, str], read: TrainingConfig) -> None:
    """Their "auto" stood for whatever a stopwatch chose; now it is the default."""
    assert TrainingConfig.model_validate(written) == read
    assert recipe("baseline", [f"training.{name}={value}" for name, value in written.items()]).training == read


def test_the_recipe_of_a_bundle_of_an_older_release_is_recognised() -> None:
    """By the sections in its bundle.json, with "auto" where there are other words today."""
    for name, config in RECIPES.items():
        sections = {part: getattr(config, part).model_dump(mode="json") for part in ("model", "techniques", "training")}
        sections["training"] |= {"precision": "auto", "compile": "auto"}
        assert named(sections) == name
    assert named(sections | {"training": {"batch_size": 77}}) == "custom"
    assert named(sections | {"training": {"a_field_of_another_release": 1}}) == "custom"
