"""Text that the job table can store, and its display on terminals of any encoding."""

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
    Make stdout and stderr accept all text in any encoding of the terminal.

    A character that the encoding lacks is replaced by a similar one in ASCII, else by '?', so that printing
    never raises a UnicodeEncodeError.
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
    """Return ASCII for a character: '->' for an arrow, 'e' for an accented e, '?' if there is none."""
    import unicodedata  # imported here because most terminals are UTF-8

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
    """Return an argument that was typed in UTF-8, which Python decodes to surrogates in another locale."""
    if not value.isascii():
        with suppress(UnicodeError):
            value.encode()
            return value
        with suppress(UnicodeError):
            return os.fsencode(value).decode()
    return value


def require_text(value: str, what: str = "") -> None:
    """
    Refuse an argument or path that is not text in the locale, which Python decodes to surrogates.

    Args:
        what: the beginning of the error message, e.g. the option's name and a blank.

    Raises:
        SpecError: it is not UTF-8.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        from jobs.errors import SpecError  # imported here because each command calls this

        shown = value.encode(errors="replace").decode()
        raise SpecError(
            f"{what}{shown!r} is not UTF-8", hint="job tables hold text only: rename the file or folder"
        ) from None
