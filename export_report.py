"""The three executed notebooks as one typeset report.pdf: notebook -> pandoc -> Typst, all from Python packages."""

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

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ("true_false.ipynb", "lab1_sparse_linear.ipynb", "hw4.ipynb")  # the assignment's order
FORMS = ("text/markdown", "image/png", "text/plain", "stdout")  # of an output, the best first
MARKER = re.compile(r"^[ \t]*#[ \t]*(?:NBVAL_[A-Z_]+|PYTEST_VALIDATE_IGNORE_OUTPUT)[ \t]*\n?", re.MULTILINE)

# Values from outside reach Typst through sys.inputs or as string literals, so they are never read as markup.
# Fonts are those inside the typst package.
STYLE = r"""
#let (student, netid, date) = (sys.inputs.student, sys.inputs.netid, toml(bytes(sys.inputs.date)).date)
#let title = "Homework 4: Pruning and Fixed-point Quantization"
#let (accent, faint) = (rgb("#00457c"), luma(45%))
#set document(title: "ECE 661 " + title, author: if student == "" { () } else { student }, date: date)
#set text(font: ("Libertinus Serif", "New Computer Modern", "DejaVu Sans Mono"), size: 10.5pt, lang: "en")
#set par(justify: true, leading: 0.62em, spacing: 0.95em)
#set page(paper: "us-letter", margin: (x: 0.9in, top: 1in, bottom: 0.95in),
  header: context if here().page() > 1 {
    let sections = query(heading.where(level: 1)).filter(h => h.location().page() <= here().page())
    let both = [ECE 661, Homework 4 #h(1fr) #sections.last().body]
    block(inset: (bottom: 0.4em), stroke: (bottom: 0.4pt + faint), text(size: 8.5pt, fill: faint, both))
  },
  footer: context if here().page() > 1 {
    align(center, text(size: 8.5pt, fill: faint, counter(page).display("1 / 1", both: true)))
  })
#show heading: set par(justify: false)
#show heading: it => {
  let looks = ((17pt, 0pt, 1em), (13pt, 1.6em, 0.85em), (11pt, 1.5em, 0.8em))
  let (size, above, below) = looks.at(calc.min(it.level, 3) - 1)
  if it.level == 1 { pagebreak(weak: true) }
  block(above: above, below: below, text(size: size, fill: accent, it.body))
}
#show link: set text(fill: accent)
#let horizontalrule = line(length: 100%, stroke: 0.4pt + faint)
// Bars around a norm are plain symbols, as in TeX. A formula wider than the text is scaled down to it.
#show math.equation: it => { show regex("[|∥]"): bar => math.class("normal", bar); it }
#show math.equation.where(block: true): it => layout(room => {
  let width = measure(it).width
  if width <= room.width { it } else { scale(room.width / width * 100%, reflow: true, it) }
})
// A table takes the largest type in which no cell wraps. If there is none, prose stays readable and wraps.
#set table(stroke: none, inset: (x: 0.55em, y: 0.32em))
#set table.hline(stroke: 0.5pt)
#show figure: set block(breakable: true)
#show table: it => layout(room => {
  set par(justify: false)
  let size = (9.5pt, 8.5pt, 7.5pt, 6.5pt).find(size => measure(text(size: size, it)).width <= room.width)
  let wrapping = if it.columns.len() <= 6 { 8.5pt } else { 6pt }
  let body = text(size: if size == none { wrapping } else { size }, it)
  block(stroke: (y: 0.8pt), breakable: measure(width: room.width, body).height > 4in, body)
})
// Each line of code is a paragraph of its own, so that it continues under its own indentation where it wraps.
#set raw(tab-size: 4)
#show raw: set text(font: "DejaVu Sans Mono")
#show raw.where(block: false): set text(size: 1.05em)
#show raw.where(block: true): set text(size: 1.25em) // Typst sets raw text at 0.8em
#show raw.where(block: true): it => for line in it.lines {
  let indent = line.text.len() - line.text.trim(" ", at: start).len()
  block(spacing: 0.52em, if line.text.trim() == "" { v(0.62em) } else {
    par(justify: false, leading: 0.45em, hanging-indent: 0.602em * (calc.min(indent, 40) + 4), line)
  })
}
#let listing(body, lang: none, keep: false, ..look) = block(width: 100%, spacing: 0.9em, sticky: keep, ..look,
  text(size: 7.5pt, hyphenate: false, raw(body, block: true, lang: lang)))
#let code = listing.with(fill: luma(96.5%), stroke: 0.5pt + luma(85%), radius: 2pt, inset: 6.5pt)
#let output = listing.with(stroke: (left: 2pt + accent.lighten(55%)), inset: (left: 8pt, right: 6.5pt, y: 2pt))
#let picture(path) = layout(room => { // a 5-inch figure takes 70 % of the text's width
  let (width, height) = measure(image(path))
  let size = calc.min(93%, room.width / width * 100%, 7.5in / height * 100%)
  align(center, image(path, width: size * width, alt: "Figure drawn by the code above"))
})
#let row(..cells) = grid(columns: (1fr, 3.5em, 3em), align: (left, right + bottom, right + bottom), ..cells)
#let entry(level, points, target, body) = context {
  let (weight, indent, above) = if level == 1 { ("bold", 0pt, 1.1em) } else { ("regular", 1.2em, 0.68em) }
  let dots = box(width: 1fr, text(fill: luma(70%), weight: "regular", repeat(gap: 0.25em)[.]))
  let cells = ([#body #dots], points, str(counter(page).at(target).first()))
  set par(justify: false, leading: 0.45em)
  block(inset: (left: indent), above: above, link(target, text(size: 9.5pt, fill: black, weight: weight, row(..cells))))
}
#let blank(value) = box(width: 7.5cm, outset: (y: 0.3em), stroke: (bottom: 0.5pt), value + "\u{a0}")
#align(center)[
  #v(2.2in)
  #text(size: 14pt, fill: faint)[ECE 661] #parbreak()
  #text(size: 24pt, fill: accent, weight: "bold", hyphenate: false, title.split(": ").join[:\ ])
  #v(0.8in)
  #set text(size: 12pt)
  #grid(columns: 2, align: (right, left), column-gutter: 1em, row-gutter: 1.4em, [Name], blank(student),
    [NetID], blank(netid), [Date], blank(date.display("[month repr:long] [day padding:none], [year]")))
]
#heading(level: 1, outlined: false, bookmarked: true)[Contents]
#row(..([Problem], [Points], [Page]).map(emph))
"""


class ReportError(RuntimeError):
    """The report could not be made; the message names the file or argument and says what to do."""


def clean(text):
    """Return text without ANSI codes, overwritten progress lines, control characters and lone surrogates."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text).encode("utf-8", "replace").decode("utf-8")


def literal(text, limit=60):
    """Return clean text as a Typst string literal on one line; words longer than `limit` may break anywhere."""
    text = re.sub(rf"\S{{{limit + 1},}}", lambda word: re.sub(r".{4}(?=.)", "\\g<0>\u200b", word[0]), text)
    return json.dumps(text, ensure_ascii=False)  # on clean text, JSON's escapes are Typst's


def read_cells(path):
    """Return a notebook's cells. Raises ReportError unless it is there, valid, wholly executed and without an error."""
    try:  # as JSON, since importing nbformat takes longer than all of the export
        cells = [{**cell, "source": "".join(cell["source"])} for cell in json.loads(path.read_bytes())["cells"]]
    except FileNotFoundError:
        raise ReportError(f"{path} is missing: run `make report`, or name the notebooks' folder with --from") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is no readable notebook of version 4, execute it again: {error!r}") from error
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] == "code" and cell["source"].strip():
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    raise ReportError(f"{path}, cell {number} stopped with {output['ename']}: "
                                      f"{clean(output['evalue'])}; mend it and execute the notebook again")
            if cell.get("execution_count") is None:
                raise ReportError(f"{path}, cell {number} was not executed: execute the notebook from top to bottom")
    return cells


def shown(cell, where):
    """Return [form, content] of a cell's source and outputs. Raises ReportError for an output in none of FORMS."""
    if cell["cell_type"] != "code":
        return [["text/markdown", cell["source"]]] if cell["cell_type"] == "markdown" else []
    parts = [["code", MARKER.sub("", cell["source"])]]
    for output in cell["outputs"]:
        forms = output.get("data") or {output.get("name", "nothing"): output.get("text", "")}
        if "stderr" in forms or any("widget" in form for form in forms):  # a live bar has no useful text form
            continue
        form = next((form for form in FORMS if form in forms), None)
        if form is None:
            raise ReportError(f"{where} shows only {', '.join(forms)}: display one of {', '.join(FORMS)}")
        if form == parts[-1][0] == "stdout":
            parts[-1][1] += "".join(forms[form])
        else:
            parts.append([form, "".join(forms[form])])
    return [[form, clean(text).strip("\n").rstrip()] for form, text in parts if clean(text).strip()]


def pieces_of(cell, where, figures):
    """Yield (is Markdown, text, where) for a cell, the text otherwise being Typst; adds its PNGs to `figures`."""
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
    """Return text converted. Raises ReportError even on a warning, such as a formula that cannot be read."""
    arguments = ["--wrap=none", "--columns=100000", "--fail-if-warnings"]  # columns: tables get no widths of pandoc's
    try:
        return pypandoc.convert_text(text, target, source, extra_args=arguments)
    except RuntimeError as error:
        raise ReportError(f"pandoc refused a Markdown cell, mend it in the notebook: {error}") from error


def parse(pieces):
    """Return the pieces as pandoc blocks. Each cell is parsed alone: a fence left open in one ends with it."""
    cells = [{"cell_type": "markdown", "metadata": {}, "source": text} for markdown, text, _ in pieces if markdown]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
    tree = pandoc(json.dumps(notebook), "ipynb-auto_identifiers-gfm_auto_identifiers", "json")
    divs = iter(json.loads(tree)["blocks"])
    return [block for markdown, text, where in pieces
            for block in (rewrite(next(divs)["c"][1], where) if markdown else [raw("Block", text)])]


def raw(kind, text):
    """Return the pandoc node for finished Typst; kind: "Block" or "Inline"."""
    return {"t": f"Raw{kind}", "c": ["typst", text]}


def rewrite(node, where, limit=40):
    """Return a pandoc node with all text as Typst strings. Raises ReportError for what would be lost, such as HTML."""
    if isinstance(node, list):
        return [rewrite(child, where, limit) for child in node]
    if not isinstance(node, dict) or "c" not in node:
        return node
    kind, content = node["t"], node["c"]
    if kind == "Str" and content.startswith("\\begin{"):
        raise ReportError(f"{where} has a formula outside dollar signs: put {content} ... between $$ and $$")
    if kind == "Str":
        return raw("Inline", f"#{literal(content, limit)};")
    if kind == "Code":
        return raw("Inline", f"#raw({literal(content[1], min(limit, 24))});")
    if kind == "CodeBlock":
        return raw("Block", f"#code({literal(content[1])}, lang: {literal((content[0][1] or ['text'])[0])})")
    if kind in ("RawInline", "RawBlock") and re.fullmatch(r"<br\s*/?>|<!--.*-->\s*", content[1], re.DOTALL):
        return raw(kind[3:], "#linebreak();" if content[1].startswith("<b") else "")
    if kind in ("RawInline", "RawBlock", "Image"):
        what = f"the image {content[2][0]}" if kind == "Image" else f"HTML, {content[1].strip()[:40]!r}"
        raise ReportError(f"{where} has {what} in its Markdown: draw it in a code cell, or write it as Markdown")
    if kind == "Link" and not re.match(r"(https?|mailto):", content[2][0]):
        return {"t": "Span", "c": [["", [], []], rewrite(content[1], where, limit)]}
    if kind == "Table":
        limit = max(4, min(16, int((480 / len(content[2]) - 6) / 3.4)))  # characters that a column of small type holds
    return {"t": kind, "c": rewrite(content, where, limit)}


def contents(blocks):
    """Return the contents page, whose points are each heading's closing "(30 points)"; labels the headings in place."""
    rows, total, section = [], 0, ""
    for level, attributes, inlines in (b["c"] for b in blocks if b["t"] == "Header" and b["c"][0] <= 2):
        tail = " ".join(inline["c"][1] for inline in inlines[-3:] if inline["t"] == "RawInline")
        match = re.search(r'(?:^| )#"\((\d+(?:\.\d+)?)"; #"points?\)";$', tail)
        points, inlines = (match[1], inlines[:-3]) if match else ("", inlines)
        section = points if level == 1 else section
        total += float(points or 0) if level == 1 or not section else 0  # a section's points include its questions'
        attributes[0] = f"problem{len(rows)}"
        opening = raw("Inline", f'#entry({level}, "{points}", <{attributes[0]}>)[')
        rows.append({"t": "Plain", "c": [opening, *inlines, raw("Inline", "];")]})
    return [*rows, raw("Block", f"#line(length: 100%, stroke: 0.4pt)\n#row([*Total*], [*{total:g}*])")]


def typeset(source, student="", netid="", date=None):
    """Return the executed notebooks in the folder `source` as a PDF's bytes.

    student, netid: for the cover and the PDF's author, "" leaves a line to write on. date: aware datetime, None: now.
    Raises ReportError for a notebook or a cell that cannot be taken over.
    """
    pieces, figures, date = [], [], date or datetime.now(timezone.utc)
    for path in (Path(source) / name for name in NOTEBOOKS):
        pieces.append((False, "#pagebreak(weak: true)", path))
        for number, cell in enumerate(read_cells(path), 1):
            pieces += pieces_of(cell, f"{path}, cell {number}", figures)
    blocks = parse(pieces)
    tree = {"pandoc-api-version": [1, 23], "meta": {}, "blocks": contents(blocks) + blocks}
    inputs = {"student": clean(student).strip(), "netid": clean(netid).strip(), "date": f"date = {date:%Y-%m-%d}"}
    with tempfile.TemporaryDirectory() as folder:
        for number, png in enumerate(figures):
            Path(folder, f"{number}.png").write_bytes(png)
        main_file = Path(folder, "report.typ")
        main_file.write_text(STYLE + pandoc(json.dumps(tree), "json", "typst"), encoding="utf-8")
        try:
            return typst.compile(main_file, root=folder, ignore_system_fonts=True, sys_inputs=inputs,
                                 timestamp=int(date.timestamp()))
        except typst.TypstError as error:
            raise ReportError(f"Typst refused the report: {error.diagnostic}") from error


def export(source, out, **cover):
    """Write typeset(source, **cover) to the file `out`, whole or not at all, and return its number of pages.

    Raises ReportError, as typeset does or if `out` cannot be written; a file that stood there is then untouched.
    """
    pdf = typeset(source, **cover)
    part = Path(f"{out}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(pdf)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"{out} cannot be written ({error.strerror}): name another file with --out") from error
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def main(arguments=None):
    """Export from the command line; STUDENT, NETID and SOURCE_DATE_EPOCH are read from the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", "--build", dest="source", type=Path, default=ROOT / "build", metavar="DIR",
                        help="folder of the executed notebooks (default: build)")
    parser.add_argument("--out", type=Path, default=ROOT / "report.pdf", metavar="FILE", help="default: report.pdf")
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
