"""A result is built unless one of the same inputs and the same code is there."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from freshrank.storage import derived
from freshrank.storage.derived import (
    Code,
    build_unless_current,
    code_fingerprint,
    fingerprint_of,
    is_current,
    marked,
    marking,
)
from freshrank.storage.files import atomic_directory, write_json

FILES = {
    "constants.py": '''
"""Of the whole shop."""
SMOOTHING = 2.0
"""Added to every count."""
COLOUR = "red"
''',
    "settings.py": """
HOME = "here"
""",
    "errors.py": """
class NoHome(Exception): ...
""",
    "log/reading.py": '''
class Log:
    """Of one day."""

    def rows(self):
        """In order of time."""
        return [1, 2]  # all of them
''',
    "counting/counts.py": """
from shop import constants, settings
from shop.errors import NoHome
from shop.log.reading import Log

def daily(log: Log):
    if not settings.HOME:
        raise NoHome
    return sum(log.rows()) + constants.SMOOTHING

def weekly(log: Log):
    return 7 * daily(log)
""",
    "learning/__init__.py": """
from shop.learning.loop import fitted as fit
""",
    "learning/loop.py": """
from math import sqrt

def fitted(counts):
    from shop.learning.techniques.mixup import mixed
    return sqrt(mixed(counts))
""",
    "learning/techniques/mixup.py": """
def mixed(counts):
    return counts / 2
""",
    "paper/page.py": """
import shop.constants

def painted(model):
    return f"{shop.constants.COLOUR} {model}"
""",
    "steps.py": """
def build(log):
    from shop.counting.counts import daily
    return daily(log)

def train(log):
    from shop import learning
    return learning.fit(build(log))

def report(log):
    from shop.paper import page
    return page.painted(train(log))
""",
}
OUTPUTS = {"counts": "shop.steps.build", "model": "shop.steps.train", "report": "shop.steps.report"}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A package whose counts make a model that a report shows."""
    for name, source in FILES.items():
        path = tmp_path / "shop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "shop"


def fingerprints(shop: Path) -> dict[str, str]:
    code = Code(shop)
    return {output: code.fingerprint(entry_point) for output, entry_point in OUTPUTS.items()}


def stale_after(shop: Path, file: str, old: str, new: str) -> set[str]:
    """The outputs that an edit makes stale."""
    before, path = fingerprints(shop), shop / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = fingerprints(shop)
    return {output for output in OUTPUTS if before[output] != after[output]}


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("constants.py", "2.0", "3.0", {"counts", "model", "report"}),
        ("log/reading.py", "[1, 2]", "[2, 1]", {"counts", "model", "report"}),
        ("counting/counts.py", "sum(", "max(", {"counts", "model", "report"}),
        ("learning/loop.py", "sqrt(mixed", "2 * sqrt(mixed", {"model", "report"}),
        ("learning/techniques/mixup.py", "/ 2", "/ 3", {"model", "report"}),
        ("learning/__init__.py", "fitted as fit", "fitted as fit, fitted", set()),
        ("constants.py", '"red"', '"blue"', {"report"}),
        ("paper/page.py", "} {", "}: {", {"report"}),
        ("steps.py", "return daily(log)", "return daily(log) + 1", {"counts", "model", "report"}),
        ("steps.py", "return page.painted", "return 2 * page.painted", {"report"}),
        ("counting/counts.py", "7 * daily", "8 * daily", set()),
        ("settings.py", "here", "there", set()),
        ("errors.py", "...", "exit_code = 2", set()),
    ],
)
def test_an_edit_makes_every_output_stale_that_its_function_contributes_to_and_no_other(
    shop: Path, file: str, old: str, new: str, stale: set[str]
) -> None:
    """In whichever package it lies, and however it is imported."""
    assert stale_after(shop, file, old, new) == stale


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("log/reading.py", "# all of them", "# the whole day"),
        ("log/reading.py", "In order of time.", "By time."),
        ("log/reading.py", '    """Of one day."""\n', ""),
        ("constants.py", "Of the whole shop.", "Of the shop."),
        ("constants.py", "Added to every count.", "Added to each."),
        ("learning/loop.py", "sqrt(mixed(counts))", "sqrt(\n        mixed(counts),\n    )"),
        ("learning/loop.py", "\ndef fitted", "\n\n\n# how it is learned\ndef fitted"),
    ],
)
def test_comments_docstrings_and_layout_leave_everything_current(shop: Path, file: str, old: str, new: str) -> None:
    """Docstrings of modules, classes, functions and attributes alike."""
    assert stale_after(shop, file, old, new) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from shop.part import f\ndef entry():\n    return f()",
        "from shop.part import f as g\ndef entry():\n    return g()",
        "from shop import part\ndef entry():\n    return part.f()",
        "import shop.part\ndef entry():\n    return shop.part.f()",
        "import shop.part as p\ndef entry():\n    return p.f()",
        "def entry():\n    from shop.part import f\n    return f()",
        "def entry():\n    import shop.part\n    return shop.part.f()",
        "from shop.relay import f\ndef entry():\n    return f()",
        "from shop import part\nCALLS = {'f': part.f}\ndef entry():\n    return CALLS['f']()",
        "from shop import part\ndef entry(name):\n    return getattr(part, name)()",
        "from shop.part import f\nclass Entry:\n    def m(self):\n        return f()\ndef entry(): return Entry().m()",
        "from shop.part import K\nclass Entry(K): ...\ndef entry():\n    return Entry().m()",
        "from shop.part import K\ndef entry(k: K):\n    return k.m()",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from shop.part import K\n"
        "def entry(k: 'list[K]'):\n    return k[0].m()",
        "from shop.part import f\n@f\ndef entry(): ...",
        "from shop.part import f\ndef entry(x=f()): ...",
        "from shop.part import f\nTABLE = {}\nTABLE['f'] = f\ndef entry():\n    return TABLE",
        "from shop.part import f\nfor x in range(3):\n    f()\ndef entry(): ...",
        "try:\n    from shop.part import f\nexcept ImportError:\n    f = None\ndef entry():\n    return f()",
        "from shop import part\na, b = part.f(), 2\ndef entry():\n    return b",
    ],
)
def test_whatever_form_an_import_has_its_code_is_found(tmp_path: Path, source: str) -> None:
    """At the top or where it is used, through another module, as a base, a decorator, a default or an annotation."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "entry.py").write_text(source)
    (package / "relay.py").write_text("from shop.part import f")
    versions = []
    for number in (1, 2):
        (package / "part.py").write_text(
            f"def f(*_):\n    return {number}\nclass K:\n    def m(self):\n        return {number}"
        )
        versions.append(Code(package).fingerprint("shop.entry.entry"))
    assert versions[0] != versions[1]


def test_the_same_text_under_another_import_is_other_code(shop: Path) -> None:
    """Also where what is imported is none of ours."""
    assert stale_after(shop, "learning/loop.py", "from math import sqrt", "from numpy import sqrt") == {
        "model",
        "report",
    }
    assert (
        stale_after(shop, "learning/loop.py", "from numpy import sqrt", "import numpy\nfrom numpy import sqrt") == set()
    )


def test_an_entry_point_that_is_not_of_the_package_is_refused(shop: Path) -> None:
    """Its code would be left out of the fingerprint without a word."""
    with pytest.raises(ValueError, match=r"received 'json.dumps', expected a function or module of 'shop'"):
        Code(shop).fingerprint("json.dumps")


def test_code_is_the_same_wherever_the_package_is_installed(tmp_path: Path) -> None:
    """Workspaces are shared by machines, and what a checkout built an installed wheel takes."""
    shutil.copytree(derived.SOURCES, tmp_path / "freshrank", ignore=shutil.ignore_patterns("__pycache__"))
    name = f"{fingerprint_of.__module__}.{fingerprint_of.__qualname__}"
    assert Code(tmp_path / "freshrank").fingerprint(name) == code_fingerprint(fingerprint_of)


def test_a_result_is_named_by_inputs_and_code() -> None:
    """Data and configuration on one side, the functions that compute it on the other."""
    one = fingerprint_of({"days": [1], "config": {"rate": 0.1}}, build_unless_current)
    assert one == fingerprint_of({"days": [1], "config": {"rate": 0.1}}, build_unless_current)
    others = [
        fingerprint_of({"days": [2], "config": {"rate": 0.1}}, build_unless_current),
        fingerprint_of({"days": [1], "config": {"rate": 0.2}}, build_unless_current),
        fingerprint_of({"days": [1], "config": {"rate": 0.1}}, derived),
    ]
    assert one not in others


def test_a_directory_is_built_once(tmp_path: Path) -> None:
    """The second time nothing runs."""
    built = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "a").touch()

    assert [build_unless_current(tmp_path / "kept", build) for _ in range(2)] == [True, False]
    assert len(built) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "a").exists()


def test_a_build_that_fails_leaves_nothing_and_is_done_again(tmp_path: Path) -> None:
    """Half a directory must never pass for a whole one."""

    def fail(directory: Path) -> None:
        (directory / "a").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build_unless_current(tmp_path / "kept", fail)
    assert list(tmp_path.iterdir()) == []
    assert build_unless_current(tmp_path / "kept", lambda directory: None)


def test_files_are_current_while_they_are_there_and_their_marker_says_so(tmp_path: Path) -> None:
    """Another fingerprint, a file that is gone and a missing marker each make them stale."""
    marker, files = tmp_path / "built.json", [tmp_path / "a", tmp_path / "b"]
    assert not is_current(marker, "one", *files)
    with marking(marker, "one", rows=7):
        for file in files:
            file.touch()
        assert not is_current(marker, "one", *files)
    assert is_current(marker, "one", *files)
    assert not is_current(marker, "two", *files)
    assert marked(marker)["rows"] == 7
    files[0].unlink()
    assert not is_current(marker, "one", *files)


@pytest.mark.parametrize(
    "text", ['"0123456789abcdef"', "[]", "null", "", "{", '{"version": 1}', '{"fingerprint": null}']
)
def test_a_marker_of_an_older_form_is_stale_and_no_error(tmp_path: Path, text: str) -> None:
    """Workspaces outlive releases: what another one wrote is built again."""
    marker = tmp_path / "built.json"
    marker.write_text(text)
    assert not is_current(marker, "0123456789abcdef")


def test_what_an_older_marker_noted_is_read(tmp_path: Path) -> None:
    """How many rows there were when a day was first built must outlast a new release."""
    write_json(tmp_path / "built.json", {"fingerprint": "old", "rows": 7, "late": 2})
    assert marked(tmp_path / "built.json") == {"fingerprint": "old", "rows": 7, "late": 2}


def test_a_marker_inside_a_directory_comes_and_goes_with_it(tmp_path: Path) -> None:
    """The old directory is current until the new one has taken its place."""
    folder = tmp_path / "day"
    for written in ("one", "two"):
        with atomic_directory(folder) as temporary, marking(temporary / "built.json", written):
            (temporary / written).touch()
            assert is_current(folder / "built.json", "one") == (written == "two")
    assert is_current(folder / "built.json", "two", folder / "two")


@pytest.mark.parametrize(
    "build",
    [
        "build_unless_current(folder / 'kept', die)",
        "with marking(folder / 'built.json', 'new'):\n die(folder)",
    ],
)
def test_a_killed_build_leaves_nothing_that_passes_for_current(tmp_path: Path, build: str) -> None:
    """kill -9 after the first file: neither the new fingerprint nor the old one fits what lies there."""
    with marking(tmp_path / "built.json", "old"):
        (tmp_path / "a").write_text("old")
    code = (
        "import os, signal, pathlib\nfrom freshrank.storage.derived import build_unless_current, marking\n"
        "def die(directory):\n (directory / 'a').write_text('new'); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n{build}"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "kept").exists()
    unchanged = (tmp_path / "a").read_text() == "old"
    assert is_current(tmp_path / "built.json", "old", tmp_path / "a") == unchanged
    assert not is_current(tmp_path / "built.json", "new", tmp_path / "a")
