"""Markdown as Typst. Text outside formulas reaches it as string literals: none is read as code."""

import base64
import binascii
import json
import re
import urllib.parse
from pathlib import Path
from typing import NamedTuple

import pypandoc

from report.cells import PICTURES, ReportError, clean

DOLLARS = re.compile(
    r"(^(?:```|~~~)[\s\S]*?^(?:```|~~~)|`[^`\n]*`|\\\$|\$\$[\s\S]*?\$\$)"  # left as it is
    r"|\$((?:[^$\\\n]|\\[\s\S]|\n(?!\s*\n))+?)\$(?=(\d?))", re.MULTILINE)


class Refusal(ReportError):
    """pandoc or Typst cannot read it, and does not say which cell it is in."""


class Piece(NamedTuple):
    """Part of a document: `text` in `form` "markdown" or "typst", and where it is from."""

    form: str
    text: str
    where: str
    folder: Path = Path()  # that local images are relative to
    attachments: dict = {}  # noqa: RUF012  (as a notebook's cell holds them)
    call: str = ""  # Typst's, that takes the text, which is a paragraph, as its content


def literal(text):
    """Return clean text as a Typst string literal."""
    return json.dumps(text, ensure_ascii=False)  # on clean text, JSON's escapes are Typst's


def raw(kind, text):
    """Return the pandoc node for finished Typst; kind: "Block" or "Inline"."""
    return {"t": f"Raw{kind}", "c": ["typst", text]}


# ---------------------------------------------------------------- pandoc


def pandoc(text, source, target):
    """Return text converted. Raises Refusal even on a warning, as for an unreadable formula, and
    ReportError where no pandoc runs.
    """
    # With many columns, tables get no widths of pandoc's. To verify the formats, which are ours,
    # is to start pandoc twice more.
    arguments = ["--wrap=none", "--columns=100000", "--fail-if-warnings"]
    try:
        return pypandoc.convert_text(text, target, source, extra_args=arguments,
                                     verify_format=False)
    except RuntimeError as error:
        raise Refusal(f"pandoc refused it, mend it in the notebook: {error}") from error
    except OSError as error:  # pypandoc tries its own and that of PATH
        raise ReportError("no pandoc runs on this machine: install one, on a Mac with `brew "
                          f"install pandoc`, and export again: {error}") from error


def parse(pieces, figures):
    """Return the pieces as pandoc blocks; adds pictures, (ending, bytes), to `figures`.

    Raises ReportError, naming the piece, for what would be lost, and Refusal.
    """
    trees = iter(_read_markdown([piece for piece in pieces if piece.form == "markdown"]))
    blocks = []
    for piece in pieces:
        if piece.form == "typst":
            blocks.append(raw("Block", piece.text))
            continue
        tree = rewrite(next(trees), piece, figures)
        if piece.call:
            if [block["t"] for block in tree] != ["Para"]:
                raise ReportError(f"{piece.where} has a caption that is not one paragraph")
            tree = [{"t": "Plain", "c": [raw("Inline", f"{piece.call}["), *tree[0]["c"],
                                         raw("Inline", "]")]}]
        blocks += tree
    return blocks


def _read_markdown(pieces):
    """Return the blocks of each piece. A fence left open in one cell ends with it."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": mark_dollars(piece.text)}
             for piece in pieces]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    tree = pandoc(json.dumps(notebook), "ipynb-auto_identifiers-gfm_auto_identifiers", "json")
    return [div["c"][1] for div in json.loads(tree)["blocks"]]


def mark_dollars(text):
    """Return Markdown in which pandoc takes for formulas what Jupyter does.

    Jupyter allows blanks inside the dollars and a digit behind them.
    """

    def marked(match):
        if match[1] is not None:
            return match[0]
        return f"${match[2].strip()}$" + ("<!-- -->" if match[3] else "")

    return DOLLARS.sub(marked, text)


# ---------------------------------------------------------------- text as literals


def rewrite(node, piece, figures):
    """Return a pandoc node with all text as Typst strings and all pictures in `figures`."""
    if isinstance(node, list):
        return [rewrite(child, piece, figures) for child in _with_units(node)]
    if not isinstance(node, dict) or "c" not in node:
        return node
    kind, content = node["t"], node["c"]
    if kind == "Str":
        if content.startswith("\\begin{"):
            raise ReportError(f"{piece.where} has a formula outside dollar signs: put {content} "
                              "... between $$ and $$")
        return raw("Inline", f"#{literal(content)};")
    if kind == "Code":
        return raw("Inline", f"#raw({literal(content[1])});")
    if kind == "CodeBlock":
        language = literal((content[0][1] or ["text"])[0])
        return raw("Block", f"#code({literal(content[1])}, lang: {language})")
    if kind in ("RawBlock", "RawInline"):
        html = re.sub(r"<!--.*?(-->|\Z)", "", content[1], flags=re.DOTALL).strip()
        if kind == "RawInline" and re.fullmatch(r"<br ?/?>", html):
            return {"t": "LineBreak"}
        if html:
            raise ReportError(f"{piece.where} has HTML, {html[:40]!r}, in its Markdown: write it "
                              "as Markdown, or draw it in a code cell")
        return raw(kind.removeprefix("Raw"), "")
    if kind == "Image":
        return _image(content, piece, figures)
    if kind == "Link" and not re.match(r"(https?|mailto):", content[2][0]):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], piece, figures)]}
    return {"t": kind, "c": rewrite(content, piece, figures)}


def _with_units(nodes):
    """Return nodes in which no line ends between a number and its percent sign."""
    kinds = [node.get("t") if isinstance(node, dict) else None for node in nodes]
    return [{"t": "Str", "c": "\u00a0"}
            if kind in ("Space", "SoftBreak") and kinds[i - 1:i] + kinds[i + 1:i + 2] == ["Str"] * 2
            and nodes[i - 1]["c"][-1:].isdigit() and nodes[i + 1]["c"].startswith("%")
            else nodes[i] for i, kind in enumerate(kinds)]


def _image(content, piece, figures):
    """Return a picture as a pandoc node: an attachment, a data URI or a local file.

    One on the web is not fetched; its description stands for it. Raises ReportError if a picture is
    not there or of no known form.
    """
    place = urllib.parse.unquote(content[2][0])  # pandoc has quoted a name's spaces
    if re.match("https?:", place):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], piece, figures)]}
    form, data = _picture(place, piece)
    if form not in PICTURES:
        raise ReportError(f"{piece.where} has the image {place[:60]}, which is not there or none "
                          f"of {', '.join(PICTURES)}")
    figures.append((PICTURES[form], data))
    alt = literal(clean(_words(content[1])))
    return raw("Inline", f'#drawn(("{len(figures) - 1}.{PICTURES[form]}",), alt: {alt});')


def _words(inlines):
    """Return what pandoc's inlines say, without their looks."""
    said = {"Str": lambda text: text, "Code": lambda pair: pair[1], "Math": lambda pair: pair[1],
            "Link": lambda link: _words(link[1])}
    return "".join(said.get(inline["t"], _words)(inline["c"]) if "c" in inline else " "
                   for inline in inlines)


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
