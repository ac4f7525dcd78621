"""Names and passwords in URLs stay out of everything that is kept or shown."""

from __future__ import annotations

import re

_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")


def without_credentials(text: str) -> str:
    """A URL, or a text with URLs in it, with ``https://user:password@host`` as ``https://host``."""
    return _USERINFO.sub("", text)
