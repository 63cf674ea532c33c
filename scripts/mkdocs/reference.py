"""A page for each public name, made from what `__all__` says."""

import inspect
import itertools
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import keras_mha

FOLDER = "api/"


def public_names() -> dict[str, list[str]]:
    """Returns the dotted names that have a page, by the module they are read from.

    Of a module without `__all__` these are the classes that it defines. What was named
    by an earlier module is not named again.
    """
    top = {name: getattr(keras_mha, name) for name in keras_mha.__all__}
    modules = {name: top.pop(name) for name in list(top) if inspect.ismodule(top[name])}
    found = {"keras_mha": [name for name in top if not name.startswith("__")]}
    seen = set(top.values())
    for module, contents in modules.items():
        objects = {name: getattr(contents, name) for name in _names_in(contents)}
        names = [name for name, value in objects.items() if value not in seen]
        if names:
            found[f"keras_mha.{module}"] = names
    return {
        module: [f"{module}.{name}" for name in names]
        for module, names in found.items()
    }


def _names_in(module) -> list[str]:
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


NAMES = public_names()
ALL = list(itertools.chain(*NAMES.values()))
CODE_OR_BAR = re.compile(r"(?P<code>`[^`]*`)|\|")
QUOTED = re.compile(r"(?<!\[)`(keras_mha\.[\w.]+)`")


def link_names(markdown: str) -> str:
    """Makes every `keras_mha.name` a link to its page."""

    def linked(match: re.Match) -> str:
        return f"[{match[0]}][{match[1]}]" if match[1] in ALL else match[0]

    return QUOTED.sub(linked, markdown)


def on_config(config: MkDocsConfig) -> None:
    for entry in config.nav:
        for title, value in entry.items():
            if value == FOLDER:
                entry[title] = [
                    {"All names": f"{FOLDER}index.md"},
                    *map(_nav_of_module, NAMES),
                ]


def _nav_of_module(module: str) -> dict:
    return {module: [{name.split(".")[-1]: _path(name)} for name in NAMES[module]]}


def _path(name: str) -> str:
    return f"{FOLDER}{name.removeprefix('keras_mha.')}.md"


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = {_path(name): f"::: {name}\n" for name in ALL}
    pages[f"{FOLDER}index.md"] = _index()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))


def _index() -> str:
    lines = ["# Reference", "", "Every public name of the package has a page.", ""]
    for module, names in NAMES.items():
        lines += [f"## {module}", ""]
        lines += ["| name | what it is |", "| --- | --- |"]
        lines += [
            f"| [`{name.split('.')[-1]}`][{name}] | {_summary(name)} |"
            for name in names
        ]
        lines.append("")
    return "\n".join(lines)


def _summary(name: str) -> str:
    """The first sentence of the docstring, as a cell of a table.

    A bar would end the cell, but in code, where a backslash would be shown.
    """
    value = keras_mha
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    text = inspect.getdoc(value).split("\n\n")[0].replace("\n", " ")
    return CODE_OR_BAR.sub(lambda match: match["code"] or r"\|", text)
