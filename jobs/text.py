"""What a job table can hold as text, and what a terminal can show of it."""

import codecs
import os
import sys
from contextlib import suppress

ASCII = "ganq-ascii"
"""ASCII under a name of our own: click writes UTF-8 to a stream whose encoding is called ascii."""
SUBSTITUTES = str.maketrans(
    {
        **{"→": "->", "…": "...", "×": "x", "·": "-", "−": "-", "–": "-", "—": "-", "±": "+-"},
        **{"≥": ">=", "≤": "<=", "½": "1/2", "µ": "u", "μ": "u", "ß": "ss"},
        **{"█": "#", "▉": "#", "─": "-", "━": "-", "╸": "-", "╺": "-", "│": "|", "•": "*"},
    }
)


def use_streams_of_any_encoding() -> None:
    """
    Let stdout and stderr take all text, whatever the terminal's encoding.

    A character that the encoding lacks is replaced by a like one of ASCII, else by '?'. So nothing that
    prints needs to know the terminal, and none of it ends with a UnicodeEncodeError.
    """
    try:
        codecs.lookup_error(ASCII)
    except LookupError:
        codecs.register_error(ASCII, _substitute)
        codecs.register(_find_ascii)
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None)
        if encoding is not None and hasattr(stream, "reconfigure"):
            plain = codecs.lookup(encoding).name in ("ascii", ASCII)
            stream.reconfigure(encoding=ASCII if plain else encoding, errors=ASCII)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(map(_like, lacking)), error.end


def _like(character: str) -> str:
    """Return ASCII for a character: '->' for an arrow, 'e' for an accented e, '?' where there is none."""
    import unicodedata  # where it is needed: most terminals are UTF-8

    plain = unicodedata.normalize("NFKD", character.translate(SUBSTITUTES))
    return plain.encode("ascii", "ignore").decode() or "?"


class _Encoder(codecs.IncrementalEncoder):
    def encode(self, text: str, final: bool = False) -> bytes:
        return text.encode("ascii", ASCII)


def _find_ascii(name: str) -> codecs.CodecInfo | None:
    if name != ASCII.replace("-", "_"):
        return None
    return codecs.CodecInfo(
        name=ASCII,
        encode=lambda text, errors=ASCII: (text.encode("ascii", ASCII), len(text)),
        decode=codecs.lookup("ascii").decode,
        incrementalencoder=_Encoder,
        incrementaldecoder=codecs.lookup("ascii").incrementaldecoder,
    )


def as_utf8(value: str) -> str:
    """Return what was typed in UTF-8, where the locale is another and Python carries it as surrogates."""
    if not value.isascii():
        with suppress(UnicodeError):
            value.encode()
            return value
        with suppress(UnicodeError):
            return os.fsencode(value).decode()
    return value


def require_text(value: str, what: str = "") -> None:
    """
    Refuse bytes that are no text in the locale; Python carries those of arguments and paths as surrogates.

    Args:
        what: begins the error, e.g. the option's name and a blank.

    Raises:
        SpecError: it would be accepted, and could not be shown or evaluated.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        from jobs.errors import SpecError  # not before it is needed: each command asks

        shown = value.encode(errors="replace").decode()
        raise SpecError(
            f"{what}{shown!r} is not UTF-8", hint="job tables hold text only: rename the file or folder"
        ) from None
