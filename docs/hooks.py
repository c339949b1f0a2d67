"""Hooks of MkDocs that write the reference of commands and of recipes from the code itself."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from emomerge.cli import main
from emomerge.merging import METHODS
from emomerge.recipe.schema import recipe_schema


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the generated part to the pages that have one."""
    written = {"reference/commands.md": commands, "reference/recipes.md": recipes, "reference/methods.md": methods}
    make = written.get(page.file.src_uri)
    return markdown if make is None else "\n\n".join([markdown, *make()])


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Draw the pages of the gallery from the stored results."""
    from mkdocs.structure.files import File

    sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
    from gallery import write_pages

    for page in write_pages(Path(tempfile.mkdtemp(prefix="emomerge-gallery-"))):
        files.append(File.generated(config, f"gallery/{page.name}", abs_src_path=str(page)))
    return files


def commands() -> Iterator[str]:
    """Yield the help of every command, as the terminal shows it."""
    for name, command in sorted(main.commands.items()):
        context = click.Context(command, info_name=f"emomerge {name}", terminal_width=100)
        yield f"## emomerge {name}\n\n```text\n{command.get_help(context)}\n```"


def recipes() -> Iterator[str]:
    """Yield a table of fields for every section of a recipe."""
    schema = recipe_schema(METHODS)
    definitions = schema["$defs"]
    yield _table("The recipe", schema)
    for name in sorted(definitions, key=lambda name: (name.endswith("Columns"), name)):
        yield _table(name, definitions[name])


def methods() -> Iterator[str]:
    """Yield the merge methods with formula and source."""
    rows = ["| method | what it computes | source |", "|---|---|---|"]
    for name, method in sorted(METHODS.items()):
        rows.append(f"| `{name}` | {_cell(method.formula)} | {_cell(method.source)} |")
    yield "\n".join(rows)


def _table(title: str, section: dict[str, Any]) -> str:
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in section.get("properties", {}).items():
        default = "required" if name in section.get("required", ()) else _default(field)
        rows.append(f"| `{name}` | {_type(field)} | {default} | {_cell(field.get('description', ''))} |")
    about = section.get("description", "").strip().splitlines()
    return "\n\n".join([f"## {title}", *about[:1], "\n".join(rows)])


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return ""
    text = json.dumps(field["default"], ensure_ascii=False)
    return "see there" if text.startswith("{") and "$ref" in str(field) else f"`{text}`"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")])).replace('"', "")
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_type(option) for option in field[key]))
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}" if "items" in field else "list"
    return {"null": "none", "object": "mapping"}.get(field.get("type", ""), field.get("type", "any"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
