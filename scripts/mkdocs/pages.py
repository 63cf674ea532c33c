"""The pages in docs/: their code is run, and parts of the README are put in.

The Python blocks of a page that says `run: true` are run in order, as a reader types
them in. A block that ends in a figure is followed by its picture, one that prints by
what it printed, so that the text and what it shows cannot differ.

`<!-- README: Heading -->` stands for the section of the README under that heading, and
`<!-- README: | head -->` for the table of the README that begins so.
"""

import ast
import contextlib
import io
import re
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HEADING_OR_BLOCK = re.compile(
    r"^#+ (?P<heading>[^\n]*)$|^```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
SECTION = re.compile(r"^<!-- README: (.*) -->$", re.MULTILINE)
# How tables are written here, and where in the site is what the README links to.
FOR_THE_SITE = {
    r"`\|`": "`|`",
    "](docs/": "](",
    "](#bring-your-weights)": "](weights.md)",
}
NOTEBOOK = re.compile(r"\]\((?:\.\./)?notebooks/(\w+)\.ipynb")


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    if not page.file.src_uri.startswith("notebooks/"):
        markdown = reference.link_names(markdown)
    if page.meta.get("run"):
        markdown = run_blocks(markdown, page, config, files)
    readme = (Path(config.config_file_path).parent / "README.md").read_text("utf-8")
    markdown = SECTION.sub(lambda match: readme_section(readme, match[1]), markdown)
    return NOTEBOOK.sub(r"](notebooks/\1.md", markdown)


def readme_section(readme: str, heading: str) -> str:
    """Returns what stands under a heading of the README, as the site has it."""
    if heading.startswith("|"):
        text = heading + readme.split(f"\n{heading}")[1].split("\n\n")[0]
    else:
        text = readme.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for old, new in FOR_THE_SITE.items():
        text = text.replace(old, new)
    return text.strip()


def run_blocks(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Runs the page's Python and puts what it draws or prints below each block."""
    names, heading, pictures = {}, "", 0

    def with_result(match: re.Match) -> str:
        nonlocal heading, pictures
        if match["code"] is None:
            heading = match["heading"]
            return match[0]
        figure, printed = run(match["code"], names, page.file.src_uri)
        result = match[0]
        if printed:
            result += f"\n\n```{{ .text .output .no-copy }}\n{printed}```"
        if figure is not None:
            pictures += 1
            name = f"{Path(page.file.src_uri).stem}/{pictures}.png"
            files.append(File.generated(config, name, content=as_png(figure)))
            result += f"\n\n![{heading}: the picture]({name}){{ .drawn }}"
        return result

    return HEADING_OR_BLOCK.sub(with_result, markdown)


def run(code: str, names: dict, where: str):
    """Runs a block; returns the figure it ends in, or `None`, and what it printed."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    return (value if hasattr(value, "savefig") else None), printed.getvalue()


def as_png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    return file.getvalue()
