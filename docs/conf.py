"""Settings of the documentation: `make docs` builds it from the pages, notebooks and docstrings.

The source folder is the repository itself, so that a link from a page to a notebook, a figure or
a file is the same on a code host and in the built pages.
"""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import make_claims  # noqa: E402
import make_figures_page  # noqa: E402
import make_findings  # noqa: E402
import make_real_page  # noqa: E402
import make_reviews  # noqa: E402
import make_tiny_models  # noqa: E402

import mmheads  # noqa: E402

make_claims.write()
make_figures_page.write()
make_findings.write()
make_real_page.write()
make_reviews.write()
make_tiny_models.write()

project = "mmheads"
author = copyright = "The mmheads authors"
release = version = mmheads.__version__
html_theme = "furo"
html_title = f"mmheads {release}"
html_show_sphinx = False
html_copy_source = False
html_additional_pages = {"index": "start.html"}
templates_path = ["templates"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/*.ipynb", "data/models/*/README.md"]
exclude_patterns = [".*", "runs", "docs/build", "tests"]

nb_execution_mode = "off"  # The notebooks show the outputs that are committed.
myst_enable_extensions: list[str] = []  # no formulas: they would need scripts from the network
myst_heading_anchors = 3

default_role = "literal"  # Docstrings write `name` for code.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def keep_bars(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Let `|A|` in a docstring be a size, and not a substitution of reStructuredText."""
    lines[:] = [line.replace("|", r"\|") if "``" not in line else line for line in lines]


def link_cards(app: Any, name: str, source: list[str]) -> None:
    """Let a card that links to the folder of another model lead to that model's card."""
    if name.startswith("data/models/"):
        source[0] = re.sub(r"\]\((\.\./[\w.-]+)/?\)", r"](\1/README.md)", source[0])


def setup(app: Any) -> None:
    """Connect what Sphinx calls while it builds."""
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("source-read", link_cards)
