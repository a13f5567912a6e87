"""One self-contained HTML page: no network, no server. Model text enters it as escaped JSON only, never as markup.

A content security policy names the hashes of the page's own script and style and forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from .inspection import Inspection
from .payload import page_data

TEMPLATE, STYLE = "page.html", "page.css"
SCRIPTS = ("data.js", "charts.js", "colours.js", "details.js", "page.js")


def render_html(inspection: Inspection) -> str:
    """The page as text, in ASCII apart from the program's own labels."""
    style = _asset(STYLE)
    script = "\n".join(["'use strict';", *map(_asset, SCRIPTS)])
    parts = {
        "POLICY": (
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embedded_json(page_data(inspection)),
    }
    # One pass, so that a token that reads {{SCRIPT}} stays text.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], _asset(TEMPLATE))


def embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element: ASCII, without any character that markup gives a meaning."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\x7f":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
