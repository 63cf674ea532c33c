"""Docstrings in Keras's style, as griffe's Google style reads them."""

import re
import textwrap

import griffe
import reference

SECTION = re.compile(r"^(\w[\w ]*):\n", re.MULTILINE)


class KerasDocstrings(griffe.Extension):
    """Rewrites the sections that Google's style has not, or has otherwise.

    Masks and named tuples also get the constructor that Python makes of their fields:
    griffe knows it of what is decorated with `dataclass` by this name only.
    """

    def on_class(self, *, cls: griffe.Class, **kwargs) -> None:
        fields = [
            griffe.Parameter(
                name,
                annotation=field.annotation,
                kind=griffe.ParameterKind.positional_or_keyword,
                default=field.value,
            )
            for name, field in cls.attributes.items()
            if field.annotation is not None and "property" not in field.labels
        ]
        if fields and "__init__" not in cls.members:
            parameters = griffe.Parameters(griffe.Parameter("self"), *fields)
            cls.set_member(
                "__init__", griffe.Function("__init__", parameters=parameters)
            )

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_google(obj.docstring.value)


def as_google(text: str) -> str:
    """Returns the docstring with the sections that griffe knows.

    `Call arguments:` become parameters under that title, the doctest below `Example:`
    is indented, and `References:` become a list.
    """
    lead, *sections = SECTION.split(text)
    pairs = zip(sections[::2], sections[1::2], strict=True)
    text = lead + "".join(_section(title, body) for title, body in pairs)
    return reference.link_names(text)


def _section(title: str, body: str) -> str:
    if title == "Call arguments":
        return f"Other parameters: Call arguments:\n{body}"
    if title in ("Example", "Examples"):
        lines = [f"    {line}" if line else "" for line in body.strip("\n").split("\n")]
        return "Examples: Example:\n" + "\n".join(lines) + "\n\n"
    if title == "Returns":  # griffe would look for a type, which a class has not
        return f"**Returns:**\n\n{textwrap.dedent(body)}"
    if title == "References":
        return f"**References:**\n\n{_references(body)}\n"
    return f"{title}:\n{body}"


def _references(body: str) -> str:
    """A list with a link each. What is indented further continues the line above."""
    joined = re.sub(r"\n {5,}", " ", body)
    return re.sub(r"^ {4}(.*?)(https?://\S+)$", r"- \1<\2>", joined, flags=re.MULTILINE)
