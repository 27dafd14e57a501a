"""Markdown as Typst. All text reaches Typst as string literals, so it is never read as markup."""

import json
import re

import pypandoc

from report.cells import ReportError

__all__ = ["literal", "pandoc", "parse", "raw"]


def literal(text, limit=60):
    """Return clean text as a Typst string literal; words longer than `limit` may break anywhere."""
    def breakable(word):
        return re.sub(r".{4}(?=.)", "\\g<0>\u200b", word[0])

    text = re.sub(rf"\S{{{limit + 1},}}", breakable, text)
    return json.dumps(text, ensure_ascii=False)  # on clean text, JSON's escapes are Typst's


def pandoc(text, source, target):
    """Return text converted. Raises ReportError even on a warning, as for an unreadable formula."""
    # With many columns, tables get no widths of pandoc's.
    arguments = ["--wrap=none", "--columns=100000", "--fail-if-warnings"]
    try:
        return pypandoc.convert_text(text, target, source, extra_args=arguments)
    except RuntimeError as error:
        raise ReportError("pandoc refused a Markdown cell, mend it in the notebook: "
                          f"{error}") from error


def parse(pieces):
    """Return the pieces as pandoc blocks. A fence left open in one cell ends with it."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text}
             for markdown, text, _ in pieces if markdown]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    tree = pandoc(json.dumps(notebook), "ipynb-auto_identifiers-gfm_auto_identifiers", "json")
    divs = iter(json.loads(tree)["blocks"])
    return [block for markdown, text, where in pieces
            for block in (rewrite(next(divs)["c"][1], where) if markdown else [raw("Block", text)])]


def raw(kind, text):
    """Return the pandoc node for finished Typst; kind: "Block" or "Inline"."""
    return {"t": f"Raw{kind}", "c": ["typst", text]}


def rewrite(node, where, limit=40):
    """Return a pandoc node with all text as Typst strings.

    Raises ReportError for what would be lost, such as HTML.
    """
    if isinstance(node, list):
        return [rewrite(child, where, limit) for child in node]
    if not isinstance(node, dict) or "c" not in node:
        return node
    kind, content = node["t"], node["c"]
    if kind == "Str":
        if content.startswith("\\begin{"):
            raise ReportError(f"{where} has a formula outside dollar signs: put {content} ... "
                              "between $$ and $$")
        return raw("Inline", f"#{literal(content, limit)};")
    if kind == "Code":
        return raw("Inline", f"#raw({literal(content[1], min(limit, 24))});")
    if kind == "CodeBlock":
        language = literal((content[0][1] or ["text"])[0])
        return raw("Block", f"#code({literal(content[1])}, lang: {language})")
    if kind in ("RawInline", "RawBlock", "Image"):
        return _html_or_image(kind, content, where)
    if kind == "Link" and not re.match(r"(https?|mailto):", content[2][0]):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], where, limit)]}
    if kind == "Table":  # characters that a column of small type holds
        limit = max(4, min(16, int((480 / len(content[2]) - 6) / 3.4)))
    return {"t": kind, "c": rewrite(content, where, limit)}


def _html_or_image(kind, content, where):
    if kind != "Image" and re.fullmatch(r"<br\s*/?>|<!--.*-->\s*", content[1], re.DOTALL):
        return raw(kind[3:], "#linebreak();" if content[1].startswith("<b") else "")
    what = (f"the image {content[2][0][:60]}" if kind == "Image"
            else f"HTML, {content[1].strip()[:40]!r}")
    raise ReportError(f"{where} has {what} in its Markdown: draw it in a code cell, or write it "
                      "as Markdown")
