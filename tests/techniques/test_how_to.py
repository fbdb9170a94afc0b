"""The code of docs/techniques.md runs, and trains."""

import re

import pytest
import torch

from freshrank.recipes import RECIPES
from tests.paths import PROJECT_ROOT

PAGE = (PROJECT_ROOT / "docs/techniques.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", PAGE, re.MULTILINE))
WITH_CODE = [title for title, text in SECTIONS.items() if "```python" in text]


def test_the_page_shows_loops_of_ones_own_and_two_libraries() -> None:
    """None of the four can fall out of the tests below unnoticed."""
    assert WITH_CODE == [
        "In a training loop of your own",
        "Ids from content, and pretraining",
        "torch-rechub",
        "deepctr-torch",
    ]


@pytest.mark.parametrize("title", WITH_CODE)
def test_the_code_of_a_section_trains(title: str) -> None:
    """Copied into an empty file, with all the techniques it shows, its losses fall."""
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL):
        exec(compile(block, f"docs/techniques.md, {title}", "exec"), names)
    losses = torch.tensor(names["losses"])
    assert torch.isfinite(losses).all()
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()


def test_the_page_names_every_recipe() -> None:
    """A new recipe is documented, and a documented one exists."""
    named = set(re.findall(r"`([a-z-]+)`", PAGE.split("## ")[0])) | set(re.findall(r"`--recipe ([a-z-]+)`", PAGE))
    assert set(RECIPES) <= named
