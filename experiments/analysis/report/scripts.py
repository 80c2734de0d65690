"""The scripts inside the page, and the policy that lets nothing else run."""

import hashlib
from base64 import b64encode
from pathlib import Path

import altair as alt
import vl_convert

FOLDER = Path(__file__).parent


def vega() -> str:
    """Vega, Vega-Lite of Altair's version and vega-embed as one script, fit to stand inside a page.

    Returns:
        JavaScript.
    """
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return _escape_script(vl_convert.javascript_bundle(vl_version=version))


def own() -> str:
    """What draws the charts and answers the controls.

    Returns:
        JavaScript.
    """
    return _escape_script((FOLDER / "charts.js").read_text(encoding="utf-8"))


def style() -> str:
    """The style sheet.

    Returns:
        CSS.
    """
    return (FOLDER / "style.css").read_text(encoding="utf-8")


def policy(*scripts: str) -> str:
    """A content security policy: these scripts by their hashes, and nothing from anywhere else.

    Args:
        *scripts: as they stand in the page.

    Returns:
        The content of the ``meta`` element.
    """
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def _escape_script(script: str) -> str:
    """A script that the page's parser cannot end or change: no end tag, no comment, one kind of line end."""
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")
