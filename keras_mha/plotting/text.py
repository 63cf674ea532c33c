"""Tokens as labels: what cannot be seen is made visible, what is long is cut."""

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

LONGEST = 14  # characters of a label
# Not even with nothing: $ and _ in a token are themselves, no formula.
PLAIN = {"parse_math": False, "usetex": False}
# It has a box with the script's name in it for every character there is.
LAST_RESORT = "Last Resort High-Efficiency"


def labels(name: str, tokens: Iterable[Any] | None, length: int) -> list[str] | None:
    """Returns what is written at the ticks, or `None` for the positions' numbers."""
    if tokens is None:
        return None
    if hasattr(tokens, "numpy") and not isinstance(tokens, Sequence):
        tokens = tokens.numpy()
    tokens = list(tokens)
    if len(tokens) != length:
        axis = "queries" if name == "query_tokens" else "keys"
        raise ValueError(
            f"`{name}` must hold a token for each of the {length} {axis}. "
            f"Received: {len(tokens)} tokens"
        )
    return [label(token) for token in tokens]


def label(token: Any) -> str:
    """Returns a token as it is written at a tick."""
    if isinstance(token, bytes):
        token = token.decode("utf-8", errors="replace")
    return _shortened(_visible(str(token)))


def _visible(token: str) -> str:
    start = len(token) - len(token.lstrip(" "))
    end = len(token.rstrip(" ")) if start < len(token) else start
    spaced = "␣" * start + token[start:end] + "␣" * (len(token) - max(start, end))
    # What joins letters, or says which way they run, has no shape of its own.
    only_marks = all(unicodedata.category(character) == "Cf" for character in token)
    unseen = ("Cc", "Zl", "Zp", "Zs", "Cs") + (("Cf",) if only_marks else ())
    return "".join(
        character.encode("unicode_escape").decode()
        if character != " " and unicodedata.category(character) in unseen
        else character
        for character in spaced
    )


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    end = LONGEST - 1
    # An accent stays with its letter.
    while end > 1 and unicodedata.category(text[end]) in ("Mn", "Mc", "Me", "Cf"):
        end -= 1
    return text[:end] + "…"


def width(text: str) -> float:
    """Returns about how wide a text is, in units of the font's size."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return 0.62 * (len(text) - wide) + wide


def font_families(texts: Iterable[str], stacklevel: int = 4) -> list[str] | None:
    """Finds fonts among those installed that have what the usual one has not.

    Args:
        texts: What is to be written.
        stacklevel: Whose line a warning is about, as in `warnings.warn`.

    Returns:
        Names of fonts, in the order in which they are asked for a character. `None` if
        the usual font has everything.
    """
    characters = {
        character
        for character in "".join(texts)
        if not character.isspace() and unicodedata.category(character) != "Cf"
    }
    usual, found, missing = _fonts_for(frozenset(characters), tuple(_usual_families()))
    if missing:
        scripts = sorted({_script(character) for character in missing})
        some = "".join(sorted(missing)[:8])
        warnings.warn(
            f"No installed font has the {', '.join(scripts)} characters of these "
            f"tokens ({some!r}), which are drawn as boxes. Install one that has, such "
            "as Noto (https://fonts.google.com/noto; Debian: fonts-noto-cjk for "
            "Chinese, Japanese and Korean, fonts-noto-core for most other scripts).",
            stacklevel=stacklevel,
        )
    if not found and not missing:
        return None
    # Without this matplotlib warns of each character by itself, each time it draws.
    return [*usual, *found, *([LAST_RESORT] if missing else [])]


def _usual_families() -> list[str]:
    from matplotlib.font_manager import FontProperties

    return FontProperties().get_family()


@lru_cache(maxsize=64)
def _fonts_for(
    characters: frozenset[str], usual: tuple[str, ...]
) -> tuple[list[str], list[str], frozenset[str]]:
    from matplotlib.font_manager import fontManager

    missing = characters
    for family in usual:
        missing -= _had_by(_file(family), missing)
    found = []
    if missing:
        _notice_new_fonts()
    names = sorted(
        {entry.name for entry in fontManager.ttflist} - {LAST_RESORT},
        key=lambda name: ("Sans" not in name, "Mono" in name, name),
    )
    while missing:
        had = {name: _had_by(_file(name), missing) for name in names}
        best = max(names, key=lambda name: len(had[name]))
        if not had[best]:
            break
        found.append(best)
        missing -= had[best]
    return list(usual), found, missing


def _file(family: str) -> str:
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties(family=[family]))


def _had_by(path: str, characters: frozenset[str]) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
    except (RuntimeError, OSError):  # of a format that it cannot read, as of emoji
        return frozenset()
    return frozenset(c for c in characters if font.get_char_index(ord(c)))


def _notice_new_fonts() -> None:
    """Lets matplotlib know of fonts installed since it made its list of them."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        try:
            fontManager.addfont(path)
        except (RuntimeError, OSError):
            continue


def _script(character: str) -> str:
    return unicodedata.name(character, "unnamed").partition(" ")[0]
