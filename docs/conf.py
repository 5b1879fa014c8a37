"""The documentation site: `make docs` builds it, and every warning is an error."""

import json
from typing import Any

import latex2mathml.converter
from docutils.nodes import SkipNode
from sphinx.application import Sphinx

from sage_select import SageConfig

SETTINGS = "% settings %"  # placeholder for the tables of settings

project = "sage-select"
author = "the authors of sage-select"
copyright = "the authors of sage-select, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "sage-select"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# docstrings use single backquotes for code, and Google's sections
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature already shows the types
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}


def math(writer: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers display without a script or a network."""
    display = "block" if type(node).__name__ == "math_block" else "inline"
    writer.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise SkipNode


def settings_tables(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the placeholder in a page by tables of all settings, made from the JSON schema."""
    if SETTINGS not in source[0]:
        return
    schema = SageConfig.model_json_schema()
    # settings at the top level first, then section by section
    sections = {"": schema} | {
        name: schema["$defs"][field["$ref"].rpartition("/")[2]]
        for name, field in schema["properties"].items()
        if "$ref" in field
    }
    text = []
    for name, section in sections.items():
        title = f"`{name}`: {section['description']}" if name else "Top level"
        text += [
            f"### {title}",
            "",
            "| setting | default | values | description |",
            "|---|---|---|---|",
        ]
        for key, field in section["properties"].items():
            if "$ref" not in field:
                description = " ".join(field["description"].split())
                default = json.dumps(field["default"])
                text.append(f"| `{key}` | `{default}` | {values(field)} | {description} |")
        text.append("")
    source[0] = source[0].replace(SETTINGS, "\n".join(text))


def values(field: dict[str, Any]) -> str:
    """Describe the possible values of a setting."""
    if "anyOf" in field:
        return " or ".join(values(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = {"null": "`null`", "string": "text", "array": "list", "object": "mapping"}
    words = kind.get(field["type"], field["type"])
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[name]}" for name, sign in bounds.items() if name in field]
    return f"{words} {', '.join(limits)}".strip()


def setup(app: Sphinx) -> None:
    """Register the tables of settings and the MathML renderer; called by Sphinx."""
    app.connect("source-read", settings_tables)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(math, None), block_renderers=(math, None)
    )


html_math_renderer = "mathml"
