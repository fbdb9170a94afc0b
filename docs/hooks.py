"""What ``mkdocs build`` does beyond rendering ``docs/``: references from the code, and pages that lie elsewhere."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import SecretStr
from pydantic_settings import BaseSettings
from typer import Context
from typer.main import get_command

from freshrank.cli.main import app
from freshrank.orchestration.kubeflow.settings import ALL_SETTINGS

REPOSITORY = Path(__file__).parent.parent
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "helm/README.md")
"""Pages outside docs/, by their path in the repository, which is also their path in the site."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    for path in ELSEWHERE:
        files.append(File.generated(config, path, abs_src_path=str(REPOSITORY / path)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    path = page.file.src_uri
    if path == "commands.md":
        markdown += "\n".join(command_reference(get_command(app), None))
    if path == "settings.md":
        markdown += "\n".join(settings_reference())
    return with_links_of_the_site(markdown, path)


def with_links_of_the_site(markdown: str, path: str) -> str:
    """Links go from file to file of the repository; what is no page of the site is named without a link."""
    here = path if path in ELSEWHERE else f"docs/{path}"

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link["target"]))
        if target in ELSEWHERE or target.startswith("docs/"):
            in_site = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(path) or ".")
            return f"[{link['text']}]({in_site}{link['rest']}"
        return link["text"] if (REPOSITORY / target).exists() else link[0]

    return re.sub(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[\w./-]+)(?P<rest>[^)]*\))", moved, markdown)


def command_reference(command: Any, parent: Context | None) -> Iterator[str]:
    """A section per command, with its options; groups are entered."""
    context = command.context_class(command, info_name="freshrank" if parent is None else command.name, parent=parent)
    is_group = hasattr(command, "commands")
    if parent is None or not is_group:
        yield f"\n### `{context.command_path}`\n\n{command.help}\n\n| | |\n|---|---|"
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record and record[0] != "--help":
                yield f"| {cell('`' + record[0] + '`')} | {cell(record[1])} |"
    if is_group:
        for each in command.commands.values():
            yield from command_reference(each, context)


def settings_reference() -> Iterator[str]:
    """A section per kind of settings: variable, default, meaning."""
    for title, kind in zip(("Of every installation", "Of Kubeflow's API", "Of a cluster"), ALL_SETTINGS, strict=True):
        yield f"\n## {title}\n\n| variable | default | meaning |\n|---|---|---|"
        yield from settings_rows(kind)


def settings_rows(kind: type[BaseSettings]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        variable = f"{kind.model_config['env_prefix']}{name.upper()}"
        value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
        default = "" if value in (None, "", {}) else f"`{value}`"
        yield f"| `{variable}` | {cell(default)} | {cell(field.description or '')} |"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
