"""Tokens as labels: what cannot be seen is made visible, what is long is cut."""

import contextlib
import unicodedata
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

LONGEST = 14  # characters of a label
# `$` and `_` in a token are themselves, no formula.
PLAIN = {"parse_math": False, "usetex": False}
# It has a box with the script's name in it for every character there is.
LAST_RESORT = "Last Resort High-Efficiency"


def labels(name: str, tokens: Iterable[Any] | None, length: int) -> list[str] | None:
    """Returns what is written at the ticks, or `None` for the positions' numbers."""
    if tokens is None:
        return None
    if hasattr(tokens, "numpy"):  # a tensor, whose items would be tensors too
        tokens = tokens.numpy()
    if not isinstance(tokens, Iterable):
        raise TypeError(
            f"`{name}` must be a sequence of tokens. "
            f"Received: {name}={tokens!r} (of type {type(tokens).__name__})"
        )
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
    return 0.55 * (len(text) - wide) + wide


def font_options(texts: Iterable[str], stacklevel: int = 4) -> dict[str, Any]:
    """Finds fonts among those installed that have what the usual one has not.

    Args:
        texts: What is to be written.
        stacklevel: Whose line a warning is about, as in `warnings.warn`.

    Returns:
        What to write them with: options of matplotlib's texts.
    """
    characters = {
        character
        for character in "".join(texts)
        if not character.isspace() and unicodedata.category(character) != "Cf"
    }
    usual = _usual_families()
    found, missing = _fonts_for(frozenset(characters), tuple(usual))
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
        return PLAIN
    # Without this matplotlib warns of each character by itself, each time it draws.
    last = [LAST_RESORT] if missing else []
    return {**PLAIN, "family": [*usual, *found, *last]}


def _usual_families() -> list[str]:
    from matplotlib.font_manager import FontProperties

    return FontProperties().get_family()


@lru_cache(maxsize=64)
def _fonts_for(
    characters: frozenset[str], usual: tuple[str, ...]
) -> tuple[list[str], frozenset[str]]:
    """Returns fonts with what the usual ones lack, and what those lack as well."""
    from matplotlib.font_manager import FontProperties, findfont

    missing = characters
    for family in usual:
        missing -= _had_by(findfont(FontProperties(family=[family])), missing)
    found: list[str] = []
    if not missing:
        return found, missing
    had = {name: _had_by(path, missing) for name, path in _installed().items()}
    while missing:
        best = max(had, key=lambda name: len(had[name] & missing))
        if not had[best] & missing:
            break
        found.append(best)
        missing -= had[best]
    return found, missing


def _installed() -> dict[str, str]:
    """Returns the fonts' names and files, first the plain ones without serifs."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    # Matplotlib keeps a list of fonts, which is older than those just installed.
    known = {entry.fname for entry in fontManager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        with contextlib.suppress(RuntimeError, OSError):  # of an unknown format
            fontManager.addfont(path)

    def plainness(entry: Any) -> tuple:
        heaviness = abs(int(entry.weight) - 400)
        return heaviness, "Sans" not in entry.name, "Mono" in entry.name, entry.name

    entries = [entry for entry in fontManager.ttflist if entry.style == "normal"]
    entries = [entry for entry in entries if entry.name != LAST_RESORT]
    files: dict[str, str] = {}
    for entry in sorted(entries, key=plainness):
        files.setdefault(entry.name, entry.fname)
    return files


def _had_by(path: str, characters: frozenset[str]) -> frozenset[str]:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
    except (RuntimeError, OSError):  # of a format that it cannot read, as of emoji
        return frozenset()
    return frozenset(c for c in characters if font.get_char_index(ord(c)))


def _script(character: str) -> str:
    return unicodedata.name(character, "unnamed").partition(" ")[0]
