"""The executed notebooks as two typeset documents: notebook -> pandoc -> Typst.

report.pdf is the homework: a cover with all results, then the questions in order. further.pdf holds
the experiments behind section 1 and going_further.ipynb.
"""

import argparse
import base64
import itertools
import json
import os
import re
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import typst

from files import atomic_write
from report.cells import PICTURES, ReportError, clean, described, read_cells, shown, tags
from report.markup import Piece, Refusal, literal, pandoc, parse, raw

MISSING = re.compile(r'the text `"(.+?)"` could not be displayed')
ROOT = Path(__file__).resolve().parents[1]
STYLE = Path(__file__).with_name("style.typ")
# file: (title, notebooks, what the cover's table says: points and results, or pages alone); a
# notebook that has a cell tagged "further" is split there
DOCUMENTS = {
    "report.pdf": ("Homework 4: Pruning and Fixed-point Quantization",
                   ("true_false.ipynb", "lab1_sparse_linear.ipynb", "hw4.ipynb"), "results"),
    "further.pdf": ("Homework 4, further: Experiments",
                    ("true_false.ipynb", "going_further.ipynb"), "pages"),
}


def part_of(cells, document):
    """Return [(number, cell)] of a notebook's cells that belong into `document`."""
    numbered = list(enumerate(cells, 1))
    split = next((i for i, cell in enumerate(cells) if "further" in tags(cell)), None)
    if split is None:
        return numbered
    return numbered[split:] if document == "further.pdf" else numbered[:split]


def pieces_of(cell, where, figures, folder=Path()):
    """Yield the Pieces of a cell; adds its outputs' pictures, (ending, bytes), to `figures`.

    folder: that local images in its Markdown are relative to.
    """
    parts = shown(cell, where)
    for i, (form, text, in_short) in enumerate(parts):
        if in_short is not None:
            yield Piece("typst", f"%in short {in_short}", where)
        if form in PICTURES:
            if i == 0 or parts[i - 1][0] not in PICTURES:
                group = itertools.takewhile(lambda part: part[0] in PICTURES, parts[i:])
                yield _figure(group, cell, where, figures)
        elif form in ("text/markdown", "text/latex"):
            yield Piece("markdown", text, where, folder, cell.get("attachments", {}))
        else:  # what a cell shows begins on the page where its code ends, unless the code is long
            follows = parts[i + 1][0] if i + 1 < len(parts) else None
            leads = follows and not (form == "code" and follows in PICTURES)  # see figures_first
            keep = "true" if leads and text.count("\n") < 20 else "false"
            call, lang = ("code", '"python"') if form == "code" else ("output", "none")
            text = f"#{call}({literal(text)}, lang: {lang}, keep: {keep})"
            yield Piece("typst", text, where)


def figures_first(pieces):
    """Return pieces in which the figures that follow listings stand before them."""
    ordered, listings = [], []
    for piece in pieces:
        call = piece.text if piece.form == "typst" else piece.call
        if call.startswith("#code("):
            listings.append(piece)
        elif call.startswith("#drawn("):
            ordered.append(piece)
        else:
            ordered += [*listings, piece]
            listings = []
    return ordered + listings


def _figure(pictures, cell, where, figures):
    """Return the Piece of pictures that a cell shows one after the other: one figure."""
    names, (caption, alt) = [], described(cell)
    for form, text, _ in pictures:
        names.append(f'"{len(figures)}.{PICTURES[form]}"')
        figures.append((PICTURES[form], text.encode() if form == "image/svg+xml"
                        else base64.b64decode(text)))
    alt = literal(alt or "Figure drawn by the code of this cell")
    call = f"#drawn(({', '.join(names)},), alt: {alt})"
    return Piece("markdown", caption, where, call=call) if caption else Piece("typst", call, where)


def contents(blocks):
    """Return (contents page, blocks without marks); labels the headings in place.

    A heading's points are its closing "(30 points)"; its result is what its section says in short:
    the mark of an answer, or the bold opening of a paragraph, "True." or "Answer: ...".
    """
    rows, total, section, kept = [], 0, "", []
    for block in blocks:
        if block["t"] == "RawBlock" and block["c"][1].startswith("%in short "):
            if rows:
                text = block["c"][1].removeprefix("%in short ")
                rows[-1]["result"] = [raw("Inline", f"#{literal(text)};")]
            continue
        kept.append(block)
        if block["t"] == "Header" and block["c"][0] <= 2:
            level, attributes, inlines = block["c"]
            tail = " ".join(i["c"][1] for i in inlines[-3:] if i["t"] == "RawInline")
            match = re.search(r'(?:^| )#"\((\d+(?:\.\d+)?)"; #"points?\)";$', tail)
            points, inlines = (match[1], inlines[:-3]) if match else ("", inlines)
            section = points if level == 1 else section
            # A section's points include its questions'.
            total += float(points or 0) if level == 1 or not section else 0
            attributes[0] = f"problem{len(rows)}"
            rows.append({"level": level, "points": points, "inlines": inlines, "result": []})
        elif rows and not rows[-1]["result"]:
            rows[-1]["result"] = _result(block)
    page = []
    for number, row in enumerate(rows):
        call = f'#entry({row["level"]}, "{row["points"]}", <problem{number}>)['
        page.append({"t": "Plain", "c": [raw("Inline", call), *row["inlines"], raw("Inline", "]["),
                                         *row["result"], raw("Inline", "];")]})
    if total:
        page.append(raw("Block", f"#line(length: 100%, stroke: 0.4pt)\n"
                                 f"#text(size: 8pt, row([*Total*], [], [*{total:g}*]))"))
    return page, kept


def kept_with_next(blocks):
    """Return blocks in which a text stays on the page of what it leads to: a question with its
    answer, a sentence with its table, figure or output. Neither it nor an answer is split.
    """
    kept, asked = [], _questions(blocks)
    for i, (block, following) in enumerate(itertools.zip_longest(blocks, blocks[1:])):
        leads = block["t"] == "Para" and following is not None and _is_led_to(following)
        if leads or i in asked:
            kept += [raw("Block", "#leading["), block, raw("Block", "]")]
        elif _is_answer(block):
            kept += [raw("Block", "#whole["), block, raw("Block", "]")]
        else:
            kept.append(block)
    return kept


def _questions(blocks):
    """Return the places of all paragraphs between a heading and the answer to it."""
    places = set()
    for answer in (i for i, block in enumerate(blocks) if _is_answer(block)):
        first = answer
        while first and blocks[first - 1]["t"] == "Para":
            first -= 1
        if first and blocks[first - 1]["t"] == "Header":
            places.update(range(first, answer))
    return places


def _is_answer(block):
    """Return whether a block is a paragraph that opens in bold with "Answer"."""
    return _bold_opening(block)[:1] in (
        [raw("Inline", '#"Answer.";')], [raw("Inline", '#"Answer:";')])


def _is_led_to(block):
    """Return whether a block is an answer, a table, a figure or an output."""
    first = block["c"][0] if block["t"] in ("Para", "Plain") and block["c"] else block
    call = first["c"][1] if first["t"].startswith("Raw") else ""
    return _is_answer(block) or first["t"] == "Table" or call.startswith(("#drawn(", "#output("))


def _bold_opening(block):
    """Return the inlines of a paragraph's bold opening, [] without one."""
    first = block["c"][0] if block["t"] == "Para" and block["c"] else {"t": ""}
    return first["c"] if first["t"] == "Strong" else []


def _result(block):
    """Return, as inlines, "True" of a paragraph that opens in bold "True.", X of "Answer: X."."""
    inlines = _bold_opening(block)
    word = inlines[0]["c"][1] if inlines and inlines[0]["t"] == "RawInline" else ""
    if word in ('#"True.";', '#"False.";'):
        return [raw("Inline", word.replace('.";', '";'))]
    return inlines[2:] if word == '#"Answer:";' else []


def typeset(document, source, student="", netid="", date=None):
    """Return one of DOCUMENTS, from the executed notebooks in the folder `source`, as PDF bytes.

    student, netid: for the cover and the PDF's author, "" leaves a line to write on. date: aware
    datetime, None: now. Raises ReportError for a notebook or a cell that cannot be taken over.
    """
    title, notebooks, cover = DOCUMENTS[document]
    pieces, figures, date = [], [], date or datetime.now(timezone.utc)
    for path in (Path(source) / name for name in notebooks):
        pieces.append(Piece("typst", "#pagebreak(weak: true)", str(path)))
        for number, cell in part_of(read_cells(path), document):
            pieces += pieces_of(cell, f"{path}, cell {number}", figures, path.parent)
    pieces = figures_first(pieces)
    inputs = {"title": title, "cover": cover, "student": clean(student).strip(),
              "netid": clean(netid).strip(), "date": f"date = {date:%Y-%m-%d}"}
    options = {"sys_inputs": inputs, "timestamp": int(date.timestamp())}
    try:
        return _compile(pieces, figures, options)
    except Refusal as refusal:
        raise _placed(refusal, pieces, figures, options) from refusal


def _compile(pieces, figures, options):
    """Return the PDF of `pieces`, of the archival kind. Raises Refusal."""
    figures = list(figures)
    page, blocks = contents(parse(pieces, figures))
    tree = {"pandoc-api-version": [1, 23], "meta": {}, "blocks": page + kept_with_next(blocks)}
    body = pandoc(json.dumps(tree), "json", "typst")
    with tempfile.TemporaryDirectory() as folder:
        for number, (ending, picture) in enumerate(figures):
            Path(folder, f"{number}.{ending}").write_bytes(picture)
        main_file = Path(folder, "report.typ")
        main_file.write_text(STYLE.read_text(encoding="utf-8") + body, encoding="utf-8")
        # The fonts of the system, and those of Windows around WSL, are asked only for characters
        # that the typst package has not. None may be missing.
        windows = [path for path in ["/mnt/c/Windows/Fonts"] if Path(path).is_dir()]
        for fonts in ({"ignore_system_fonts": True}, {"font_paths": windows}):
            try:
                return typst.compile(main_file, root=folder, pdf_standards=["a-2b"], **fonts,
                                     **options)
            except typst.TypstError as error:
                missing = MISSING.search(error.diagnostic)
                if not missing:
                    raise Refusal(f"Typst refused it: {error.diagnostic}") from error
    character = re.sub(r"\\u\{(\w+)\}", lambda code: chr(int(code[1], 16)), missing[1])[0]
    raise Refusal(f"no font here can draw {character!r}: install one that can, as fonts-noto-cjk "
                  "for Chinese and Korean, or write it otherwise")


def _placed(refusal, pieces, figures, options):
    """Return the ReportError of the first piece without which the document is not refused."""
    good, bad = -1, len(pieces)  # how many of the first pieces; -1: not even the cover
    while bad - good > 1:
        half = (good + bad) // 2
        try:
            _compile(pieces[:half], figures, options)
            good = half
        except Refusal as error:
            bad, refusal = half, error
    where = pieces[bad - 1].where if bad else "STUDENT or NETID, on the cover"
    return ReportError(f"{where}: {refusal}")


def export(document, source, out, **cover):
    """Write typeset(document, source, **cover) to the file `out`; return its number of pages.

    Whole or not at all. Raises ReportError, as typeset does or if `out` cannot be written; a file
    that stood there is then untouched.
    """
    pdf = typeset(document, source, **cover)
    try:
        with atomic_write(out) as file:
            file.write(pdf)
    except OSError as error:
        raise ReportError(f"{error}; name another folder with --out") from error
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def main(arguments=None):
    """Command line; STUDENT, NETID and SOURCE_DATE_EPOCH are read from the environment."""
    parser = argparse.ArgumentParser(prog="python -m report.export", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "build", metavar="DIR",
                        help="folder of the executed notebooks (default: build)")
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR",
                        help="folder of the PDFs (default: this repository)")
    options = parser.parse_args(arguments)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        if epoch and not re.fullmatch(r"\d{1,11}", epoch, re.ASCII):
            raise ReportError(f"SOURCE_DATE_EPOCH must be whole seconds since 1970, got {epoch!r}")
        date = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else None
        cover = {"student": os.environ.get("STUDENT", ""), "netid": os.environ.get("NETID", ""),
                 "date": date}
        for document in DOCUMENTS:
            out = options.out / document
            pages = export(document, options.source, out, **cover)
            print(f"{out}: {pages} pages, {out.stat().st_size / 1e6:.2f} MB")
    except ReportError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
