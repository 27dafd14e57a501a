"""The executed notebooks as one typeset report.pdf: notebook -> pandoc -> Typst."""

import argparse
import base64
import json
import os
import re
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import pypandoc
import typst

from files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
STYLE = Path(__file__).with_name("style.typ")
NOTEBOOKS = ("true_false.ipynb", "lab1_sparse_linear.ipynb", "hw4.ipynb")  # the assignment's order
FORMS = ("text/markdown", "image/png", "text/plain", "stdout")  # of an output, the best first
MARKER = re.compile(
    r"^[ \t]*#[ \t]*(?:NBVAL_[A-Z_]+|PYTEST_VALIDATE_IGNORE_OUTPUT)[ \t]*\n?", re.MULTILINE
)


class ReportError(RuntimeError):
    """The report could not be made; the message names the file or argument and says what to do."""


def clean(text):
    """Return text without ANSI codes, overwritten progress lines, control characters and lone
    surrogates.
    """
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text).encode("utf-8", "replace").decode("utf-8")


def literal(text, limit=60):
    """Return clean text as a Typst string literal on one line; words longer than `limit` may break
    anywhere.
    """
    text = re.sub(
        rf"\S{{{limit + 1},}}", lambda word: re.sub(r".{4}(?=.)", "\\g<0>\u200b", word[0]), text
    )
    return json.dumps(text, ensure_ascii=False)  # on clean text, JSON's escapes are Typst's


def read_cells(path):
    """Return a notebook's cells. Raises ReportError unless it is there, valid, wholly executed and
    without an error.
    """
    try:  # as JSON, since importing nbformat takes longer than all of the export
        cells = [
            {**cell, "source": "".join(cell["source"])}
            for cell in json.loads(path.read_bytes())["cells"]
        ]
    except FileNotFoundError:
        raise ReportError(
            f"{path} is missing: run `make report`, or name the notebooks' folder with --from"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path} is no readable notebook of version 4, execute it again: {error!r}"
        ) from error
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] == "code" and cell["source"].strip():
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    raise ReportError(
                        f"{path}, cell {number} stopped with {output['ename']}: "
                        f"{clean(output['evalue'])}; mend it and execute the notebook again"
                    )
            if cell.get("execution_count") is None:
                raise ReportError(
                    f"{path}, cell {number} was not executed: execute the notebook from top to "
                    "bottom"
                )
    return cells


def shown(cell, where):
    """Return [form, content] of a cell's source and outputs. Raises ReportError for an output in
    none of FORMS.
    """
    if cell["cell_type"] != "code":
        return [["text/markdown", cell["source"]]] if cell["cell_type"] == "markdown" else []
    parts = [["code", MARKER.sub("", cell["source"])]]
    for output in cell["outputs"]:
        forms = output.get("data") or {output.get("name", "nothing"): output.get("text", "")}
        # a live bar has no useful text form
        if "stderr" in forms or any("widget" in form for form in forms):
            continue
        form = next((form for form in FORMS if form in forms), None)
        if form is None:
            raise ReportError(
                f"{where} shows only {', '.join(forms)}: display one of {', '.join(FORMS)}"
            )
        if form == parts[-1][0] == "stdout":
            parts[-1][1] += "".join(forms[form])
        else:
            parts.append([form, "".join(forms[form])])
    return [[form, clean(text).strip("\n").rstrip()] for form, text in parts if clean(text).strip()]


def pieces_of(cell, where, figures):
    """Yield (is Markdown, text, where) for a cell, the text otherwise being Typst; adds its PNGs to
    `figures`.
    """
    parts = shown(cell, where)
    for i, (form, text) in enumerate(parts):
        if form == "image/png":
            figures.append(base64.b64decode(text))
            yield False, f'#picture("{len(figures) - 1}.png")', where
        elif form == "text/markdown":
            yield True, text, where
        else:  # what a cell shows begins on the page where its code ends, unless the code is long
            keep = "true" if i < len(parts) - 1 and text.count("\n") < 20 else "false"
            call, lang = ("code", '"python"') if form == "code" else ("output", "none")
            yield False, f"#{call}({literal(text)}, lang: {lang}, keep: {keep})", where


def pandoc(text, source, target):
    """Return text converted. Raises ReportError even on a warning, such as a formula that cannot be
    read.
    """
    # columns: tables get no widths of pandoc's
    arguments = ["--wrap=none", "--columns=100000", "--fail-if-warnings"]
    try:
        return pypandoc.convert_text(text, target, source, extra_args=arguments)
    except RuntimeError as error:
        raise ReportError(
            f"pandoc refused a Markdown cell, mend it in the notebook: {error}"
        ) from error


def parse(pieces):
    """Return the pieces as pandoc blocks. Each cell is parsed alone: a fence left open in one ends
    with it.
    """
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": text}
        for markdown, text, _ in pieces
        if markdown
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    tree = pandoc(json.dumps(notebook), "ipynb-auto_identifiers-gfm_auto_identifiers", "json")
    divs = iter(json.loads(tree)["blocks"])
    return [block for markdown, text, where in pieces
            for block in (rewrite(next(divs)["c"][1], where) if markdown else [raw("Block", text)])]


def raw(kind, text):
    """Return the pandoc node for finished Typst; kind: "Block" or "Inline"."""
    return {"t": f"Raw{kind}", "c": ["typst", text]}


def rewrite(node, where, limit=40):
    """Return a pandoc node with all text as Typst strings. Raises ReportError for what would be
    lost, such as HTML.
    """
    if isinstance(node, list):
        return [rewrite(child, where, limit) for child in node]
    if not isinstance(node, dict) or "c" not in node:
        return node
    kind, content = node["t"], node["c"]
    if kind == "Str" and content.startswith("\\begin{"):
        raise ReportError(
            f"{where} has a formula outside dollar signs: put {content} ... between $$ and $$"
        )
    if kind == "Str":
        return raw("Inline", f"#{literal(content, limit)};")
    if kind == "Code":
        return raw("Inline", f"#raw({literal(content[1], min(limit, 24))});")
    if kind == "CodeBlock":
        return raw(
            "Block",
            f"#code({literal(content[1])}, lang: {literal((content[0][1] or ['text'])[0])})",
        )
    if kind in ("RawInline", "RawBlock") and re.fullmatch(
        r"<br\s*/?>|<!--.*-->\s*", content[1], re.DOTALL
    ):
        return raw(kind[3:], "#linebreak();" if content[1].startswith("<b") else "")
    if kind in ("RawInline", "RawBlock", "Image"):
        what = (
            f"the image {content[2][0]}"
            if kind == "Image"
            else f"HTML, {content[1].strip()[:40]!r}"
        )
        raise ReportError(
            f"{where} has {what} in its Markdown: draw it in a code cell, or write it as Markdown"
        )
    if kind == "Link" and not re.match(r"(https?|mailto):", content[2][0]):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], where, limit)]}
    if kind == "Table":
        # characters that a column of small type holds
        limit = max(4, min(16, int((480 / len(content[2]) - 6) / 3.4)))
    return {"t": kind, "c": rewrite(content, where, limit)}


def contents(blocks):
    """Return the contents page, whose points are each heading's closing "(30 points)"; labels the
    headings in place.
    """
    rows, total, section = [], 0, ""
    for level, attributes, inlines in (
        b["c"] for b in blocks if b["t"] == "Header" and b["c"][0] <= 2
    ):
        tail = " ".join(inline["c"][1] for inline in inlines[-3:] if inline["t"] == "RawInline")
        match = re.search(r'(?:^| )#"\((\d+(?:\.\d+)?)"; #"points?\)";$', tail)
        points, inlines = (match[1], inlines[:-3]) if match else ("", inlines)
        section = points if level == 1 else section
        # a section's points include its questions'
        total += float(points or 0) if level == 1 or not section else 0
        attributes[0] = f"problem{len(rows)}"
        opening = raw("Inline", f'#entry({level}, "{points}", <{attributes[0]}>)[')
        rows.append({"t": "Plain", "c": [opening, *inlines, raw("Inline", "];")]})
    return [
        *rows,
        raw("Block", f"#line(length: 100%, stroke: 0.4pt)\n#row([*Total*], [*{total:g}*])"),
    ]


def typeset(source, student="", netid="", date=None):
    """Return the executed notebooks in the folder `source` as a PDF's bytes.

    student, netid: for the cover and the PDF's author, "" leaves a line to write on. date: aware
    datetime, None: now. Raises ReportError for a notebook or a cell that cannot be taken over.
    """
    pieces, figures, date = [], [], date or datetime.now(timezone.utc)
    for path in (Path(source) / name for name in NOTEBOOKS):
        pieces.append((False, "#pagebreak(weak: true)", path))
        for number, cell in enumerate(read_cells(path), 1):
            pieces += pieces_of(cell, f"{path}, cell {number}", figures)
    blocks = parse(pieces)
    tree = {"pandoc-api-version": [1, 23], "meta": {}, "blocks": contents(blocks) + blocks}
    inputs = {
        "student": clean(student).strip(),
        "netid": clean(netid).strip(),
        "date": f"date = {date:%Y-%m-%d}",
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, png in enumerate(figures):
            Path(folder, f"{number}.png").write_bytes(png)
        main_file = Path(folder, "report.typ")
        text = STYLE.read_text(encoding="utf-8") + pandoc(json.dumps(tree), "json", "typst")
        main_file.write_text(text, encoding="utf-8")
        try:
            return typst.compile(
                main_file,
                root=folder,
                ignore_system_fonts=True,
                sys_inputs=inputs,
                timestamp=int(date.timestamp()),
            )
        except typst.TypstError as error:
            raise ReportError(f"Typst refused the report: {error.diagnostic}") from error


def export(source, out, **cover):
    """Write typeset(source, **cover) to the file `out`, whole or not at all, and return its number
    of pages.

    Raises ReportError, as typeset does or if `out` cannot be written; a file that stood there is
    then untouched.
    """
    pdf = typeset(source, **cover)
    try:
        with atomic_write(out) as file:
            file.write(pdf)
    except OSError as error:
        raise ReportError(f"{error}; name another file with --out") from error
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def main(arguments=None):
    """Export from the command line; STUDENT, NETID and SOURCE_DATE_EPOCH are read from the
    environment.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--from",
        "--build",
        dest="source",
        type=Path,
        default=ROOT / "build",
        metavar="DIR",
        help="folder of the executed notebooks (default: build)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "report.pdf", metavar="FILE", help="default: report.pdf"
    )
    options = parser.parse_args(arguments)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        if epoch and not re.fullmatch(r"\d{1,11}", epoch, re.ASCII):
            raise ReportError(f"SOURCE_DATE_EPOCH must be whole seconds since 1970, got {epoch!r}")
        date = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else None
        student, netid = os.environ.get("STUDENT", ""), os.environ.get("NETID", "")
        pages = export(options.source, options.out, student=student, netid=netid, date=date)
    except ReportError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {pages} pages, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
