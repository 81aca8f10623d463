"""Settings of the documentation site; `bash docs/build.sh` builds it, warnings are errors."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docstrings
import generate

project = "ItemizedCLIP"
author = "The ItemizedCLIP developers"
copyright = "the ItemizedCLIP developers, MIT licence"
version = release = version_of("itemizedclip")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = [
    "_build",
    "search.md",
]  # search.html is the site's own search; the page is mounted under another name
nitpicky = False  # the types of other libraries have no pages here; links between our own pages are checked by MyST

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature says the types
maximum_signature_line_length = 160
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries = False  # a third of the time of a build

suppress_warnings = [
    "misc.highlighting_failure",  # sketches of code are not always code
    "ref.python",  # two classes of one name: the type in a signature links to neither
]

# Nothing is fetched, neither when the pages are built nor when they are read: no fonts, no scripts from elsewhere.
html_theme = "furo"
html_title = f"ItemizedCLIP {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def setup(app) -> None:
    """Links of pages into the project folder, and docstrings, become what Sphinx reads."""
    app.connect("source-read", generate.mend_links)
    app.connect("autodoc-process-docstring", docstrings.to_rst, priority=400)  # before napoleon
