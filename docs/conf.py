"""How Sphinx builds the documentation: `make docs`. Nothing here, and nothing on the pages built, needs a network."""

import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import docutils.nodes as nodes
from latex2mathml.converter import convert
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

import ngplus

REPOSITORY = Path(__file__).parents[1]
# Pages that are no documents, and where they stand among those that are built.
MADE = {
    REPOSITORY / "results" / "report" / "index.html": "report/index.html",
    REPOSITORY / "docs" / "challenge" / "lion.html": "challenge/lion.html",
}

logger = logging.getLogger(__name__)

project = "ngplus"
author = "the NG+ reproduction developers"
version = release = ngplus.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
exclude_patterns = ["conf.py"]
nitpicky = True
# torch's own pages are not read, so its names, and aliases of types that are no class, have no target here.
nitpick_ignore_regex = [("py:.*", r"(?!ngplus\.[A-Z]).*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"ngplus {version}"
html_static_path = ["static", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["pages.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"


def write_mathml(translator: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers set by themselves; with a warning where it is not understood."""
    block, formula = isinstance(node, nodes.math_block), node.astext()
    try:
        mathml = convert(formula, display="block" if block else "inline")
    except Exception as error:  # of many kinds
        logger.warning("%r in the formula %s", error, formula, location=node)
        raise nodes.SkipNode from error
    # Of `\\mathcal G` without braces the font would be lost: browsers know no other mathvariant.
    if unknown := re.findall(r"\\\w+|mathvariant=\"(?!normal)[^\"]*\"", mathml):
        logger.warning("unknown %s in the formula %s", ", ".join(unknown), formula, location=node)
    translator.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


class ShortenTestNames(SphinxPostTransform):
    """The name of a test, too long for a table, is a tooltip of the word "test"."""

    default_priority = 500
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Replace ``file.py::test_name`` in the current document."""
        for literal in list(self.document.findall(nodes.literal)):
            if re.fullmatch(r"[\w/]+\.py::\w+", literal.astext()):
                literal.replace_self(nodes.abbreviation("", "test", explanation=literal.astext()))


class LinkToMade(SphinxPostTransform):
    """A link to one of `MADE` opens the page; links to other files of the repository offer a copy of the file."""

    default_priority = 500
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Replace download links to them in the current document."""
        for download in list(self.document.findall(download_reference)):
            place = MADE.get((REPOSITORY / "docs" / download["reftarget"]).resolve())
            if place is not None:
                link = nodes.reference("", "", *download.children, refuri=place, internal=True)
                download.replace_self(link)


def escape_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In docstrings |S| is a number of elements; reStructuredText takes it for a substitution."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def close_examples(app: Sphinx, docname: str, source: list[str]) -> None:
    """Leave out the blank line at the end of an example, which doctest needs to know where the output ends."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def copy_made(app: Sphinx, error: Exception | None) -> None:
    """Put them among the pages."""
    for source, place in MADE.items() if error is None else ():
        target = Path(app.outdir) / place
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what is defined here."""
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.add_post_transform(LinkToMade)
    app.add_post_transform(ShortenTestNames)
    app.connect("source-read", close_examples)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("build-finished", copy_made)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
