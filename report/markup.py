"""Markdown and HTML as Typst. Nothing of a notebook is ever read as code.

All text reaches Typst as string literals, and in formulas a word that is no name of Typst's own
mathematics becomes a string, too.
"""

import base64
import binascii
import functools
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pypandoc
import typst

from report.cells import PICTURES, ReportError

__all__ = ["Piece", "literal", "mark_dollars", "pandoc", "parse", "quote_words", "raw"]


class Piece(NamedTuple):
    """Part of a document: `text` in `form` "markdown", "html" or "typst", and where it is from."""

    form: str
    text: str
    where: str
    folder: Path = Path()  # that local images are relative to
    attachments: dict = {}  # noqa: RUF012  (as a notebook's cell holds them)


def literal(text, limit=60):
    """Return clean text as a Typst string literal; words longer than `limit` may break anywhere."""

    def breakable(word):
        return re.sub(r".{4}(?=.)", "\\g<0>\u200b", word[0])

    text = re.sub(rf"\S{{{limit + 1},}}", breakable, text)
    return json.dumps(text, ensure_ascii=False)  # on clean text, JSON's escapes are Typst's


def raw(kind, text):
    """Return the pandoc node for finished Typst; kind: "Block" or "Inline"."""
    return {"t": f"Raw{kind}", "c": ["typst", text]}


# ---------------------------------------------------------------- formulas

DOLLARS = re.compile(
    r"(^(?:```|~~~)[\s\S]*?^(?:```|~~~)|`[^`\n]*`|\\\$|\$\$[\s\S]*?\$\$)"  # left as it is
    r"|\$((?:[^$\\\n]|\\[\s\S]|\n(?!\s*\n))+?)\$(?=(\d?))", re.MULTILINE)


def mark_dollars(text):
    """Return Markdown in which pandoc takes for formulas what Jupyter does.

    Jupyter allows blanks inside the dollars and a digit behind them.
    """

    def marked(match):
        if match[1] is not None:
            return match[0]
        return f"${match[2].strip()}$" + ("<!-- -->" if match[3] else "")

    return DOLLARS.sub(marked, text)


@functools.cache
def _mathematics():
    """Return the names that Typst's mathematics defines."""
    with tempfile.TemporaryDirectory() as folder:
        query = Path(folder, "names.typ")
        query.write_text("#metadata(dictionary(sym).keys() + dictionary(math).keys()) <names>")
        return frozenset(json.loads(typst.query(query, "<names>", field="value", one=True)))


TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"|\\.'  # a string, an escape
    r"|(?P<call>#[a-z]+\([^()\[\]$]*(?P<opens>\)|\[))"  # pandoc's own #h(2em), or #box(..., [
    r"|(?P<dollar>\$)|(?P<close>\])|(?P<word>[A-Za-z]{2,})(?:\.[a-z.]+)?(?![\w:])", re.DOTALL)


def quote_words(text):
    """Return Typst in which each word of a formula that mathematics does not define is a string."""
    modes = []  # "$", a formula; "[", text that a call within a formula holds

    def token(match):
        inside = modes[-1:] == ["$"]
        if match["dollar"]:
            modes.pop() if inside else modes.append("$")
        elif inside and match["opens"] == "[":
            modes.append("[")
        elif match["close"] and modes[-1:] == ["["]:
            modes.pop()
        elif inside and match["word"] and match["word"] not in _mathematics():
            return f'"{match[0]}"'
        return match[0]

    return TOKEN.sub(token, text)


# ---------------------------------------------------------------- pandoc


def pandoc(text, source, target):
    """Return text converted. Raises ReportError even on a warning, as for an unreadable formula."""
    # With many columns, tables get no widths of pandoc's.
    arguments = ["--wrap=none", "--columns=100000", "--fail-if-warnings"]
    try:
        return pypandoc.convert_text(text, target, source, extra_args=arguments)
    except RuntimeError as error:
        reason = re.sub(r"data:[\w/+;=,-]{40}\S*", "data:...", str(error))
        raise ReportError(f"pandoc refused it, mend it in the notebook: {reason}") from error


def parse(pieces, figures):
    """Return the pieces as pandoc blocks; adds pictures, (ending, bytes), to `figures`.

    Raises ReportError, naming the piece, for what cannot be read or would be lost.
    """
    markdown = [piece for piece in pieces if piece.form == "markdown"]
    try:
        trees = _read_markdown(markdown)
        pandoc(json.dumps(_document([block for tree in trees for block in tree])), "json", "typst")
    except ReportError:  # which of them?
        for piece in markdown:
            try:
                pandoc(json.dumps(_document(_read_markdown([piece])[0])), "json", "typst")
            except ReportError as error:
                raise ReportError(f"{piece.where}: {error}") from error
        raise
    trees, blocks = iter(trees), []
    for piece in pieces:
        if piece.form == "typst":
            blocks.append(raw("Block", piece.text))
        else:
            tree = next(trees) if piece.form == "markdown" else _read_html(piece.text)
            blocks += rewrite(tree, piece, figures)
    return blocks


def _document(blocks):
    return {"pandoc-api-version": [1, 23], "meta": {}, "blocks": blocks}


def _read_markdown(pieces):
    """Return the blocks of each piece. A fence left open in one cell ends with it."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": mark_dollars(piece.text)}
             for piece in pieces]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    tree = pandoc(json.dumps(notebook), "ipynb-auto_identifiers-gfm_auto_identifiers", "json")
    return [div["c"][1] for div in json.loads(tree)["blocks"]]


def _read_html(text):
    return json.loads(pandoc(text, "html-auto_identifiers", "json"))["blocks"]


# ---------------------------------------------------------------- text as literals

TAGS = {"b": "strong", "strong": "strong", "i": "emph", "em": "emph", "u": "underline",
        "sub": "sub", "sup": "super", "s": "strike", "del": "strike"}


def rewrite(node, piece, figures, limit=40):
    """Return a pandoc node with all text as Typst strings and all pictures in `figures`."""
    if isinstance(node, list):
        return [rewrite(child, piece, figures, limit) for child in node]
    if not isinstance(node, dict) or "c" not in node:
        return node
    kind, content = node["t"], node["c"]
    if kind == "Str":
        if content.startswith("\\begin{"):
            raise ReportError(f"{piece.where} has a formula outside dollar signs: put {content} "
                              "... between $$ and $$")
        return raw("Inline", f"#{literal(content, limit)};")
    if kind == "Code":
        return raw("Inline", f"#raw({literal(content[1], min(limit, 24))});")
    if kind == "CodeBlock":
        language = literal((content[0][1] or ["text"])[0])
        return raw("Block", f"#code({literal(content[1])}, lang: {language})")
    if kind == "RawBlock":
        return {"t": "Div", "c": [["", [], []],
                                  rewrite(_read_html(content[1]), piece, figures, limit)]}
    if kind == "RawInline":
        return _inline_html(content[1], piece, figures)
    if kind == "Image":
        return _image(content, piece, figures)
    if kind == "Link" and not re.match(r"(https?|mailto):", content[2][0]):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], piece, figures, limit)]}
    if kind == "Table":  # characters that a column of small type holds
        limit = max(4, min(16, int((480 / len(content[2]) - 6) / 3.4)))
    return {"t": kind, "c": rewrite(content, piece, figures, limit)}


def _inline_html(text, piece, figures):
    """Return one tag of inline HTML, as a pandoc node. Raises ReportError for one that is unknown.
    """
    match = re.fullmatch(r"<(/?)(\w+)[^>]*>", text, re.DOTALL)
    name = match[2].lower() if match else ""
    if text.startswith("<!--") or name in ("center", "span", "font", "a", "p", "div"):
        return raw("Inline", "")
    if name == "br":
        return raw("Inline", "#linebreak();")
    if name in TAGS:
        return raw("Inline", "]" if match[1] else f"#{TAGS[name]}[")
    if name == "img":
        return {
            "t": "Span",
            "c": [
                ["", [], []],
                [
                    rewrite(inline, piece, figures)
                    for block in _read_html(text)
                    for inline in block["c"]
                ],
            ],
        }
    raise ReportError(f"{piece.where} has HTML, {text.strip()[:40]!r}, in its Markdown: draw it in "
                      "a code cell, or write it as Markdown")


def _image(content, piece, figures):
    """Return a picture as a pandoc node: an attachment, a data URI or a local file.

    One on the web is not fetched; its description stands for it. Raises ReportError if a picture is
    not there or of no known form.
    """
    place = content[2][0]
    if re.match("https?:", place):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], piece, figures)]}
    form, data = _picture(place, piece)
    if form not in PICTURES:
        raise ReportError(
            f"{piece.where} has the image {place[:60]}, which is not there or none of "
            f"{', '.join(PICTURES)}"
        )
    figures.append((PICTURES[form], data))
    return raw("Inline", f'#picture("{len(figures) - 1}.{PICTURES[form]}")')


def _picture(place, piece):
    """Return (form, bytes) of a picture, its form as in PICTURES, or (None, None)."""
    try:
        name = place.removeprefix("attachment:")  # which pandoc may have removed
        if name in piece.attachments:
            [(form, text)] = piece.attachments[name].items()
            return form, base64.b64decode("".join(text), validate=False)
        if place.startswith("data:"):
            form, text = re.fullmatch(r"data:([\w/+]+);base64,(.*)", place, re.DOTALL).groups()
            return form, base64.b64decode(text)
        path = piece.folder / place
        endings = {f".{ending}": form for form, ending in PICTURES.items()}
        endings[".jpeg"] = "image/jpeg"
        return endings.get(path.suffix.lower()), path.read_bytes()
    except (KeyError, ValueError, AttributeError, OSError, binascii.Error):
        return None, None
