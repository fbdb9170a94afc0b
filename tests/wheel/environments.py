"""Environments that hold the built wheel and what its metadata asks for, and nothing else.

The packages are those of the environment the tests run in, linked file by file: that takes seconds, needs no network,
and what the metadata forgets is truly missing.
"""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement

from tests.paths import PROJECT_ROOT

UV = Path(sys.executable).with_name("uv")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "freshrank", "components", "dags", "feature_repo", "triton_models")


def build_wheel(folder: Path) -> Path:
    """The wheel that a checkout gives by way of its source distribution, as for whoever installs from the index."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        source = PROJECT_ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, checkout)
    arguments = ["--offline", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder / "dist"]
    subprocess.run([UV, "build", "--quiet", *arguments, checkout], check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    shutil.rmtree(checkout)
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment and an empty directory that its programs run in."""

    path: Path

    @classmethod
    def create(cls, path: Path, wheel: Path) -> "Environment":
        """With the wheel and none of its dependencies."""
        made = cls(path)
        venv.create(path, symlinks=True)
        (path / "work").mkdir()
        subprocess.run(
            [UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", made.python, wheel], check=True
        )
        return made

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def site(self) -> Path:
        (site,) = (self.path / "lib").glob("python*/site-packages")
        return site

    def link(self, *requirements: str, without: str = "") -> "Environment":
        """Add what ``requirements`` name, with everything it depends on in turn but ``without``."""
        for each in self._closure(list(map(Requirement, requirements)), without):
            link_files(each, self.site)
        return self

    def _closure(self, wanted: list[Requirement], without: str) -> Iterator[Distribution]:
        seen: set[tuple[str, str]] = set()
        while wanted:
            requirement = wanted.pop()
            if requirement.name == without:
                continue
            found = self._distribution(requirement.name)
            if not any(name == found.name for name, _ in seen):
                yield found
            for extra in {"", *requirement.extras} - {extra for name, extra in seen if name == found.name}:
                seen.add((found.name, extra))
                children = map(Requirement, found.requires or [])
                wanted += [each for each in children if not each.marker or each.marker.evaluate({"extra": extra})]

    def _distribution(self, name: str) -> Distribution:
        """The wheel itself is the one installed here."""
        if name != "freshrank":
            return distribution(name)
        (metadata,) = self.site.glob("freshrank-*.dist-info")
        return Distribution.at(metadata)

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Its Python with ``arguments``, in its empty directory or ``cwd``, knowing nothing of this checkout."""
        own = ("PYTHON", "FRESHRANK_", "AIRFLOW", "VIRTUAL_ENV")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.work,
            env=inherited | {"PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def check(self) -> str:
        """What pip would complain of: a dependency that is missing or of another version."""
        result = subprocess.run(
            [UV, "pip", "check", "--python", self.python], capture_output=True, text=True, check=False
        )
        return "" if result.returncode == 0 else result.stderr


def link_files(package: Distribution, site: Path) -> None:
    """All that is importable of ``package``, and its metadata; programs stay behind."""
    if package.name == "freshrank":
        return
    assert package.files is not None, f"{package.name} has no list of its files"
    for file in package.files:
        if file.parts[0] != ".." and file.suffix != ".pyc":
            _link(Path(str(file.locate())), site / file)
            if file.suffix == ".py":
                # Where it is compiled already it need not be again.
                _link(Path(cache_from_source(str(file.locate()))), Path(cache_from_source(str(site / file))))


def _link(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
