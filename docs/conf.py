"""The site: Sphinx with MyST pages. Needs no network.

uv run --extra docs sphinx-build -W -b html docs docs/_build
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # as a checkout has it, installed or not

project = "adaptive_ts"
release = re.search(
    r'__version__ = "(.+)"', (ROOT / "adaptive_ts" / "__init__.py").read_text()
).group(1)
version = release
copyright = "the authors of adaptive_ts; Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "jupyter_execute", "tables/*.md"]  # the tables are included by pages
autodoc_mock_imports = ["hackable_diffusion", "kauldron"]  # of an extra, on newer Pythons alone
html_theme = "furo"
html_title = f"adaptive_ts {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
add_module_names = False
highlight_language = "text"  # formulas; blocks of pages name their language
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # without types
default_role = "py:obj"

_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Source", "Example")
_HEAD = re.compile(rf"^({'|'.join(_SECTIONS)}):(?:\s+(\S.*))?$")


def _sections(app, what, name, obj, options, lines):
    """Docstrings as they are written here, made what napoleon reads.

    A section may start on its heading's line; the source is a paragraph of its own; an indented
    block of the description is a formula.
    """
    out, section, inline = [], "", False
    for line in lines:
        head = _HEAD.match(line)
        if head:
            section, inline = head[1], bool(head[2])
            out += [""] if out and out[-1] else []
            out += _opened(section, head[2])
            continue
        if section == "Source":
            out.append(line.strip())
        elif section and inline and line.startswith("  "):
            out.append(f"  {line}")  # goes on with the item of the heading's line
        else:
            out += ["::", ""] if not section and _starts_formula(line, out) else []
            out.append(line)
    lines[:] = [_escaped(line) for line in out]


def _opened(section, text):
    """A section's first lines; text is what stands on its heading's line, if anything."""
    if section == "Source" or (section == "Args" and text and not re.match(r"[\w, ]+: ", text)):
        return [f"**{section}:** {text or ''}"]  # a paragraph: "as for `corrupt`; ..."
    return [f"{section}:", *([f"  {text}"] if text else [])]


def _starts_formula(line, before):
    if not line.startswith("  ") or not before or before[-1]:
        return False
    return not re.match(r"(\*|\d+\.) ", _last_text(before)) and _last_text(before) != "::"


def _last_text(lines):
    """The last line that says something at the left margin."""
    return next((line for line in reversed(lines) if line and not line.startswith(" ")), "")


def _escaped(line):
    """|S| and |Q| are sizes here, not substitutions."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = re.split(r"(``.*?``)", line)
    return "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in parts)


def _missing_reference(app, env, node, contnode):
    """`name` in a docstring is the one public thing of this name, wherever it is."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains["py"]
    target = node["reftarget"].removeprefix("ats.")
    found = [
        (full, entry)
        for full, entry in domain.objects.items()
        if full == f"adaptive_ts.{target}" or full.endswith(f".{target}")
    ]
    if len({full for full, _ in found}) != 1:
        return None
    full, entry = found[0]
    from sphinx.util.nodes import make_refnode

    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, full)


def setup(app):
    """Sphinx calls it."""
    app.connect("autodoc-process-docstring", _sections, priority=100)  # before napoleon
    app.connect("missing-reference", _missing_reference)
