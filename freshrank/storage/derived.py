"""Build unless current: how a result that is computed from others is known to be of today's inputs and code.

A result has one fingerprint: :func:`fingerprint_of` its inputs (data and configuration) and its code. Either the name
of its directory carries it (:func:`build_unless_current`), or a marker beside files at fixed paths holds it
(:func:`is_current`, :func:`marking`).

Its code is found, never listed: from the function that computes it, every definition of this package that its text
names, and what those name in turn, across modules, whether they are imported at the top or where they are used. A class
counts as a whole, and so does a module that is passed on as a value. Comments, docstrings and layout do not count,
nor do the modules of :data:`PLACES`. What no import statement shows is not found: a module that is imported under a
computed name.
"""

import ast
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import freshrank
from freshrank.storage.files import atomic_directory, fingerprint, read_json, write_json

EntryPoint = Callable[..., Any] | ModuleType
SOURCES = Path(freshrank.__file__).parent
"""Read once per process, which goes on with the code that it has."""
PLACES = {"settings", "errors", "storage.workspace"}
"""Modules that say where things lie and what is said when they do not: no result holds any of it. What may change a
result is configuration, and a result's inputs hold it."""
_FINGERPRINT = "fingerprint"


def fingerprint_of(inputs: Any, *entry_points: EntryPoint) -> str:
    """Changes when the JSON-able ``inputs`` (data and configuration) do, or code that ``entry_points`` reach."""
    return fingerprint({"inputs": inputs, "code": code_fingerprint(*entry_points)})


def build_unless_current(directory: Path, build: Callable[[Path], None]) -> bool:
    """Have ``build`` fill ``directory``, whose name carries its fingerprint, unless it is there; whether it was built.

    It appears whole or not at all.
    """
    if directory.is_dir():
        return False
    with atomic_directory(directory) as temporary:
        build(temporary)
    return True


def is_current(marker: Path, expected: str, *files: Path) -> bool:
    """Whether ``files`` are there and ``marker`` says that they are of the fingerprint ``expected``."""
    return all(file.exists() for file in files) and marked(marker).get(_FINGERPRINT) == expected


def marked(marker: Path) -> dict[str, Any]:
    """What was noted when the files of ``marker`` were written; nothing where it is missing or of an older form."""
    try:
        noted = read_json(marker)
    except (FileNotFoundError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


@contextmanager
def marking(marker: Path, written: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """While its files are written there is no ``marker``; then it holds ``written``, their fingerprint, and ``facts``.

    Facts that only the files tell are added to what it yields. A process killed in between leaves files that are not
    current.
    """
    marker.unlink(missing_ok=True)
    yield facts
    write_json(marker, {_FINGERPRINT: written, **facts})


def code_fingerprint(*entry_points: EntryPoint) -> str:
    """Changes when any definition does that ``entry_points`` reach.

    Raises:
        ValueError: one of them is not of this package.
    """
    return _code(SOURCES).fingerprint(*map(_dotted, entry_points))


def _dotted(entry_point: EntryPoint) -> str:
    if isinstance(entry_point, ModuleType):
        return entry_point.__name__
    return f"{entry_point.__module__}.{entry_point.__qualname__}"


@cache
def _code(package: Path) -> "Code":
    return Code(package)


Definition = tuple[str, str]
"""A module and a name at its top level; the empty name is what the module does besides when it is imported."""


class Code:
    """The definitions of one package, and which of them need which; a module is read when it is first asked for."""

    def __init__(self, package: Path) -> None:
        self._package = package
        self._modules: dict[str, _Module | None] = {}
        self._needs: dict[Definition, tuple[str, set[Definition]]] = {}
        self._fingerprints: dict[tuple[str, ...], str] = {}

    def fingerprint(self, *entry_points: str) -> str:
        """:func:`code_fingerprint` of dotted names."""
        if entry_points not in self._fingerprints:
            digests = [self._needed(definition)[0] for definition in sorted(self.reached(*entry_points))]
            self._fingerprints[entry_points] = fingerprint(digests)
        return self._fingerprints[entry_points]

    def reached(self, *entry_points: str) -> set[Definition]:
        """All that ``entry_points``, dotted names, need; themselves included."""
        waiting: list[Definition] = []
        for name in entry_points:
            if not (found := self._resolved(name)):
                raise ValueError(f"code: received '{name}', expected a function or module of '{self._package.name}'")
            waiting += found
        seen: set[Definition] = set()
        while waiting:
            definition = waiting.pop()
            if definition not in seen:
                seen.add(definition)
                waiting += self._needed(definition)[1]
        return seen

    def _needed(self, definition: Definition) -> tuple[str, set[Definition]]:
        """Digest of a definition's text and of what each of its names stands for; the definitions these are."""
        if definition not in self._needs:
            name, module = definition[1], self._module(definition[0])
            assert module is not None
            text, names = module.definition(name)
            digest = hashlib.sha256(repr((definition, text, sorted(names))).encode()).hexdigest()
            self._needs[definition] = digest, set().union(*map(self._resolved, names))
        return self._needs[definition]

    def _resolved(self, dotted: str) -> set[Definition]:
        """What a dotted name stands for; nothing where it is another package's."""
        if dotted.partition(".")[0] != self._package.name:
            return set()
        path, below = dotted, ""
        while (module := self._module(path)) is None:
            path, _, attribute = path.rpartition(".")
            below = f"{attribute}.{below}"
        if path.partition(".")[2] in PLACES:
            return set()
        name, _, attributes = below.removesuffix(".").partition(".")
        found = {(path, ""), *((path, each) for each in module.standing_for(name))}
        if name in module.imports:
            found |= self._resolved(f"{module.imports[name]}.{attributes}".removesuffix("."))
        return found

    def _module(self, dotted: str) -> "_Module | None":
        """The module of that name; None where there is none."""
        if dotted not in self._modules:
            path = self._package.parent.joinpath(*dotted.split("."))
            files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
            source = files[0].read_text("utf-8") if files else ""
            self._modules[dotted] = _Module(dotted, source) if files or path.is_dir() else None
        return self._modules[dotted]


_IMPORT = (ast.Import, ast.ImportFrom)
_NAME = (ast.Name, ast.Attribute)
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NO_MEANING = {"ctx", "kind", "type_comment"}


class _Module:
    """The top-level statements of a module by the names they bind, and what its imported names stand for."""

    def __init__(self, dotted: str, source: str) -> None:
        self.dotted = dotted
        self.imports: dict[str, str] = {}
        self.statements: dict[str, list[ast.stmt]] = {"": []}
        for statement in ast.parse(source).body:
            if _is_docstring(statement):
                continue
            for node in () if isinstance(statement, _NAMED) else ast.walk(statement):
                self.imports |= _imported(node)
            for name in _bound(statement):
                self.statements.setdefault(name, []).append(statement)

    def standing_for(self, name: str) -> set[str]:
        """The statements meant by ``name``: all where it is none that the module is seen to bind."""
        if name and name in self.statements:
            return {name}
        is_set_by_import = name.startswith("__") and name.endswith("__")
        return set() if name in self.imports or is_set_by_import else set(self.statements)

    def definition(self, name: str) -> tuple[str, set[str]]:
        """Text of the statements that bind ``name``, and the dotted names that they use."""
        text = _Text()
        for statement in self.statements[name]:
            text.read(statement)
        imports, used = self.imports | text.imports, set()
        for base, *attributes in text.names:
            if base in imports:
                used.add(".".join([imports[base], *attributes]))
            elif base in self.statements:
                used.add(f"{self.dotted}.{base}")
        return "\n".join(text.tokens), used


class _Text:
    """Statements as tokens that lack comments, docstrings and layout; the names and imports in them. One pass: a step
    waits for it."""

    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.names: set[tuple[str, ...]] = set()
        """Each with the attributes that are asked of it."""
        self.imports: dict[str, str] = {}

    def read(self, node: ast.AST, is_annotation: bool = False) -> None:
        if isinstance(node, _NAME):
            self._read_name(node)
        elif isinstance(node, _IMPORT):
            self.imports |= _imported(node)  # what is used of it counts, under the name of what it stands for
        else:
            self.tokens.append(type(node).__name__)
            if is_annotation and isinstance(node, ast.Constant) and isinstance(node.value, str):
                with suppress(SyntaxError):  # a Literal's value, not a type in quotes
                    self.read(ast.parse(node.value, mode="eval").body)
            for field in node._fields:
                if field not in _NO_MEANING:
                    self._read_field(getattr(node, field, None), is_annotation or field in ("annotation", "returns"))

    def _read_name(self, node: ast.Attribute | ast.Name) -> None:
        attributes: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            if isinstance(base.ctx, ast.Load):
                self.names.add((base.id, *attributes))
            self.tokens.append(".".join([base.id, *attributes]))
        else:
            self.tokens += attributes
            self.read(base)

    def _read_field(self, value: Any, is_annotation: bool) -> None:
        if isinstance(value, ast.AST):
            self.read(value, is_annotation)
        elif isinstance(value, list):
            self.tokens.append("[")
            for each in value:
                if not _is_docstring(each):
                    self._read_field(each, is_annotation)
            self.tokens.append("]")
        else:
            self.tokens.append(repr(value))


def _is_docstring(node: Any) -> bool:
    """Of a module, class or function, or of the attribute above it."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imported(node: ast.AST) -> dict[str, str]:
    """What the names that ``node`` imports stand for."""
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.Import):
        # "import a.b" binds a.
        bound = {alias.asname: alias.name for alias in node.names if alias.asname}
        return bound | {first: first for first in (a.name.partition(".")[0] for a in node.names if not a.asname)}
    return {}


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement at the top level binds; the empty one where it may do something else besides."""
    if isinstance(statement, _NAMED):
        return {statement.name}
    targets: list[ast.AST] = [statement]
    if isinstance(statement, ast.Assign):
        targets = [*statement.targets]
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    nodes = [node for target in targets for node in ast.walk(target)]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, _NAMED)}
    only_names = all(isinstance(node, ast.Name | ast.Tuple | ast.expr_context) for node in nodes)
    return names if only_names else names | {""}
