"""The notebooks as pages, with the outputs that were kept. Nothing is run."""

import base64
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = "notebooks/"
INDEX = """# Notebooks

Each runs on a laptop in under two minutes, under any backend, from an empty folder.
They are in `notebooks/` of the sources; what stands here is what they showed when they
were run.
"""
OUTPUT = "{ .text .output .no-copy }"
ANSI = re.compile(r"\x1b\[[\d;]*m")


def _notebooks(config: MkDocsConfig) -> list[Path]:
    return sorted((Path(config.config_file_path).parent / FOLDER).glob("*.ipynb"))


def on_config(config: MkDocsConfig) -> None:
    pages = [f"{FOLDER}{path.stem}.md" for path in _notebooks(config)]
    pages.insert(0, {"All notebooks": f"{FOLDER}index.md"})
    for entry in config.nav:
        for title, value in entry.items():
            if value == FOLDER:
                entry[title] = pages


def on_files(files: Files, config: MkDocsConfig) -> None:
    made, index = {}, INDEX
    for path in _notebooks(config):
        notebook = nbformat.read(path, as_version=4)
        page, pictures = as_markdown(notebook, path.stem)
        title, _, first = notebook.cells[0].source.partition("\n")
        first = first.strip().split("\n\n")[0]
        index += f"\n## [{title.strip('# ')}]({path.stem}.md)\n\n{first}\n"
        made |= {f"{path.stem}.md": page, **pictures}
    made["index.md"] = index
    for name, content in made.items():
        files.append(File.generated(config, f"{FOLDER}{name}", content=content))


def as_markdown(notebook, stem: str) -> tuple[str, dict[str, bytes]]:
    """Returns a notebook's page, and its pictures by the name of their file."""
    parts, pictures, above = [], {}, stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            above = cell.source
            # Notebooks link to notebooks.
            parts.append(re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", cell.source))
        elif cell.cell_type == "code":
            parts.append(_fenced(cell.source, "python"))
            for number, output in enumerate(cell.outputs):
                data = output.get("data", {})
                if "image/png" in data:
                    name = f"{stem}/{cell.id}-{number}.png"
                    pictures[name] = base64.b64decode(data["image/png"])
                    parts.append(f"![{_caption(above)}: the picture]({name})")
                else:
                    text = output.get("text") or data.get("text/plain", "")
                    parts.append(_fenced(ANSI.sub("", text), OUTPUT))
    return "\n\n".join(parts), pictures


def _caption(text: str) -> str:
    """The last heading in a notebook's text, or its first sentence, without markup."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    caption = headings[-1] if headings else re.split(r"[.:]\s|\n\n", text)[0]
    caption = re.sub(r"\]\([^)]*\)|[\[\]`*$]", "", caption)
    return " ".join(caption.split()).rstrip(".:")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````" if text.strip() else ""
