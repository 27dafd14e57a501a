"""The PDFs as an independent reader (pypdf) sees them."""

import base64
import errno
import functools
import io
import json
import os
import re
import resource
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pypandoc
import pytest
import typst
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from pypdf import PdfReader
from pypdf.generic import ContentStream

from conftest import REPOSITORY
from report import export as export_report
from report.cells import described, read_cells
from report.export import DOCUMENTS, ReportError, export, part_of

TEXT_WIDTH = (8.5 - 2 * 0.9) * 72  # points, on letter paper with the report's margins
RIGHT_EDGE = (8.5 - 0.9) * 72
NOTEBOOKS = DOCUMENTS["report.pdf"][1]
NASTY = r"""#"$*_\<>[x]@y`z`~//{}#panic("no") Zoë"""
SPECIAL = "≥ ≤ → × µ λ − ✓ ± ∈ ∞ é"


# ---------------------------------------------------------------- making notebooks and reading PDFs


def code(source, *outputs, count=1):
    return new_code_cell(source, execution_count=count, outputs=list(outputs))


def stdout(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def display(**bundle):
    return new_output(
        "display_data", {mime.replace("_", "/"): body for mime, body in bundle.items()}
    )


def figure(width=5, height=3, dpi=100, noise=False):
    """A PNG of `width` x `height` inches that says so, as matplotlib's do."""
    shape = (int(height * dpi), int(width * dpi), 3)
    pixels = np.full(shape, 200, np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", dpi=(dpi, dpi))
    return display(image_png=base64.b64encode(file.getvalue()).decode(), text_plain="<Figure>")


def captioned(cell, caption, alt):
    cell.metadata["mystnb"] = {"figure": {"caption": caption}, "image": {"alt": alt}}
    return cell


def table(header, rows):
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return display(
        text_markdown="\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines),
        text_plain="T",
    )


def write_into(folder, *notebooks):
    """Write all notebooks, the homework's from up to three lists of cells; return their folder."""
    for name, cells in zip(NOTEBOOKS, [*notebooks, [], [], []]):
        nbformat.write(
            new_notebook(cells=cells or [new_markdown_cell(f"# {name}")]), folder / name
        )
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Going further")]),
                   folder / "going_further.ipynb")
    return folder


def read_from(folder, *notebooks, **cover):
    """Export lists of cells and return pypdf's reader of the report."""
    export("report.pdf", write_into(folder, *notebooks), folder / "report.pdf", **cover)
    return PdfReader(folder / "report.pdf")


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_into, tmp_path)


@pytest.fixture
def read(tmp_path):
    return functools.partial(read_from, tmp_path)


def flat(text):
    """Text without white space and soft hyphens: what a reader keeps of it wherever it wraps."""
    return re.sub(r"[\s\u00ad]", "", text)


def text_of(reader):
    return "\n".join(page.extract_text() for page in reader.pages)


def numbered(sources, gap="\n\n"):
    """A cell of each Markdown source, between words by which shown_between finds what it shows.

    A document of one word takes as long as one of twenty: cases that do no harm share one.
    """
    return [new_markdown_cell(f"before{i:02}{gap}{source}{gap}after{i:02}")
            for i, source in enumerate(sources)]


def shown_between(reader, sources):
    """[(source, what flat text shows of it)] of what numbered made."""
    text, shown = flat(text_of(reader)), []
    for i, source in enumerate(sources):
        assert text.count(f"before{i:02}") == text.count(f"after{i:02}") == 1, (source, text)
        shown.append((source, text.split(f"before{i:02}")[1].split(f"after{i:02}")[0]))
    return shown


def operations(page):
    return ContentStream(page.get_contents(), page.pdf).operations


def drawn(page):
    """What a page's drawing operators put where, in points: texts [(x, y, size)] and pictures
    [(width, height, y of the lower edge)].
    """
    stack, page_matrix, text_matrix, size, texts, pictures = [], np.eye(3), np.eye(3), 0, [], []

    def matrix(a, b, c, d, e, f):
        return np.array([[a, b, 0], [c, d, 0], [e, f, 1]], dtype=float)

    for operands, operator in operations(page):
        if operator == b"q":
            stack.append(page_matrix)
        elif operator == b"Q":
            page_matrix = stack.pop()
        elif operator == b"cm":
            page_matrix = matrix(*operands) @ page_matrix
        elif operator == b"BT":
            text_matrix = np.eye(3)
        elif operator == b"Tm":
            text_matrix = matrix(*operands)
        elif operator == b"Td":
            text_matrix = matrix(1, 0, 0, 1, *operands) @ text_matrix
        elif operator == b"Tf":
            size = float(operands[1])
        elif operator in (b"Tj", b"TJ"):
            at = text_matrix @ page_matrix
            texts.append((at[2, 0], at[2, 1], size * abs(at[1, 1])))
        elif (
            operator == b"Do"
            and page["/Resources"]["/XObject"][operands[0]]["/Subtype"] == "/Image"
        ):
            lower = min(page_matrix[2, 1], page_matrix[2, 1] + page_matrix[1, 1])
            pictures.append((abs(page_matrix[0, 0]), abs(page_matrix[1, 1]), lower))
    return texts, pictures


def right_edge(reader):
    """Where the rightmost run of text begins on any page but the cover, in points."""
    return max(x for page in reader.pages[1:] for x, _, _ in drawn(page)[0])


def missing_glyphs(reader):
    """Number of times that the PDF draws glyph 0, the box that stands for a character no font has.
    """
    count = 0
    for operands, operator in (
        operation for page in reader.pages for operation in operations(page)
    ):
        for item in operands[0] if operator == b"TJ" else operands if operator == b"Tj" else []:
            codes = getattr(item, "original_bytes", b"")
            count += sum(codes[i : i + 2] == b"\0\0" for i in range(0, len(codes), 2))
    return count


# ---------------------------------------------------------------- cover, contents, bookmarks

HOMEWORK = [
    [
        new_markdown_cell("# 1 True/False (20 points)"),
        new_markdown_cell("## 1.1 A *claim* on $x_1$ (2 points)"),
    ],
    [
        new_markdown_cell(
            "# 2 Lab 1: Sparse optimization (30 points)\n\nIntroduction.\n\n"
            "## (b) Descent (3 points)"
        ),
        new_markdown_cell("### Detail"),
    ],
    [
        new_markdown_cell("# 3 Lab 2: Pruning (25 points)\n\n## (a) One (1 point)"),
        new_markdown_cell("# 4 Lab 3: Quantization (25 points)\n\n## (a) The STE (2.5 points)"),
        new_markdown_cell("# Going further\n\n## Without points"),
    ],
]


@pytest.fixture(scope="module")
def homework(tmp_path_factory):
    """pypdf's reader of the report of HOMEWORK."""
    return read_from(tmp_path_factory.mktemp("homework"), *HOMEWORK)


def test_contents_list_every_problem_with_points_and_page(homework):
    contents = flat(homework.pages[0].extract_text())
    for entry in ("1 True/False 20 2", "2 Lab 1: Sparse optimization 30 3", "(b) Descent 3 3",
                  "3 Lab 2: Pruning 25 4", "(a) One 1 4", "4 Lab 3: Quantization 25 5",
                  "(a) The STE 2.5 5", "Going further 6", "Without points 6"):
        title, *numbers = re.split(r" (?=[\d.]+(?: \d+)?$)", entry, maxsplit=1)
        assert re.search(re.escape(flat(title)) + r"\.*" + flat(numbers[0]), contents), entry
    assert contents.split("Total")[1].startswith("100")
    assert "points)" not in contents and "Detail" not in contents
    for page, title in ((1, "1 True/False"), (2, "2 Lab 1"), (3, "3 Lab 2"), (4, "4 Lab 3"),
                        (5, "Going further")):
        assert flat(title) in flat(homework.pages[page].extract_text())


def test_total_counts_questions_where_the_section_has_no_points(read):
    reader = read([new_markdown_cell("# One\n\n## a (4 points)\n\n## b (1 point)")],
                  [new_markdown_cell("# Two (6 points)\n\n## c (6 points)")])
    assert flat(reader.pages[0].extract_text()).split("Total")[1].startswith("11")


def test_bookmarks_follow_the_headings(homework):
    def titles(items):
        return [titles(item) if isinstance(item, list) else item.title for item in items]

    contents, *sections = titles(homework.outline)
    assert contents == "Results"
    assert sections[0] == "1 True/False (20 points)" and sections[1][0].startswith("1.1 A claim on")
    assert sections[2:] == [
        "2 Lab 1: Sparse optimization (30 points)",
        ["(b) Descent (3 points)", ["Detail"]],
        "3 Lab 2: Pruning (25 points)",
        ["(a) One (1 point)"],
        "4 Lab 3: Quantization (25 points)",
        ["(a) The STE (2.5 points)"],
        "Going further",
        ["Without points"],
    ]
    labs = [item for item in homework.outline if not isinstance(item, list)]
    assert [homework.get_destination_page_number(item) for item in labs] == [0, 1, 2, 3, 4, 5]


def test_every_page_but_the_cover_is_numbered_and_named(homework):
    pages = [flat(page.extract_text()) for page in homework.pages]
    assert f"1/{len(pages)}" not in pages[0]
    for number, text in enumerate(pages[1:], 2):
        assert f"{number}/{len(pages)}" in text and "ECE661,Homework4" in text


@pytest.mark.parametrize("name", [NASTY, "Ada Lovelace", "Ó O'Neil-Müller"])
def test_name_and_netid_appear_literally(read, name):
    reader = read(student=name, netid=name[::-1])
    cover = flat(reader.pages[0].extract_text())
    assert flat(name) in cover and flat(name[::-1]) in cover
    assert "ECE661" in cover and "Homework4:PruningandFixed-pointQuantization" in cover
    assert reader.metadata.author == name
    assert reader.metadata.title == "ECE 661 Homework 4: Pruning and Fixed-point Quantization"


def test_without_a_name_the_cover_leaves_room_and_the_file_has_no_author(read):
    reader = read(student="  ")
    assert re.search("Name.*NetID.*Date", flat(reader.pages[0].extract_text()))
    assert not reader.metadata.author


def test_source_date_epoch_fixes_date_and_bytes(write, monkeypatch, tmp_path):
    folder = write(*HOMEWORK)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1741000000")  # 3 March 2025, UTC
    made = []
    for name in ("one", "two"):
        export_report.main(["--from", str(folder), "--out", str(tmp_path / name)])
        made.append([(tmp_path / name / document).read_bytes() for document in DOCUMENTS])
    assert made[0] == made[1]
    cover = PdfReader(tmp_path / "one" / "report.pdf").pages[0]
    assert "March3,2025" in flat(cover.extract_text())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(SystemExit, match="SOURCE_DATE_EPOCH must be .* 'yesterday'"):
        export_report.main(["--from", str(folder), "--out", str(tmp_path / "one")])


# ---------------------------------------------------------------- what cells show


def test_cell_content_is_never_markup(read):
    inline = r"#panic() \<b> @ref \[x\] = a // b /* c */ \`d\` \*e\* \_f\_ 1\) ~ \$"
    links = "[in](#nowhere) [out](https://example.org/a#b)"
    reader = read(
        [
            new_markdown_cell(f"# T\n\nText {inline} end\n\n- `#x \"`(y) `z`[w] `v`.u\n\n{links}"),
            code(f"s = '''{NASTY}'''", stdout(NASTY), display(text_plain=NASTY)),
        ]
    )
    text = flat(text_of(reader))
    assert flat("Text #panic() <b> @ref [x] = a // b /* c */ `d` *e* _f_ 1) ~ $ end") in text
    assert flat('#x "(y) z[w] v.u') in text
    assert text.count(flat(NASTY)) == 3


def test_ansi_codes_stderr_and_overwritten_lines_are_left_out(read):
    bar = new_output(
        "display_data",
        {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "bar at zero"},
    )
    reader = read([new_markdown_cell("# T"), code(
        "kept = 1",
        stdout("one \x1b[31mred\x1b[0m\n"),
        stdout("secret", "stderr"), stdout("10 %|#\r100 %|##\nlast"), bar,
        display(text_html="<b>html</b>", text_plain="plain"))])
    text = flat(text_of(reader))
    assert "kept=1" in text and "onered100%|##last" in text
    for absent in ("secret", "10%|#100", "html", "barat", "[31m"):
        assert absent not in text


def test_markdown_output_is_preferred_and_its_code_is_coloured(read):
    source = "def shown(x):\n    return 'a string'  # why"
    bundle = display(text_markdown=f"```python\n{source}\n```", text_plain="<Markdown>")
    reader = read([new_markdown_cell("# T"), code("show_source(f)", bundle)])
    page = reader.pages[1]
    assert flat(source) in flat(page.extract_text()) and "<Markdown>" not in page.extract_text()
    colours = {
        tuple(operands)
        for operands, operator in operations(page)
        if operator in (b"scn", b"rg", b"sc")
    }
    assert len(colours) >= 5  # box, keyword, name, string and comment at least


def test_cells_cannot_spill_into_each_other(read):
    texts = ("# T\n\n```\nopen fence", "## Later (2 points)", "<!-- open", "## Last")
    reader = read([new_markdown_cell(text) for text in texts])
    assert [item.title for item in reader.outline[2]] == ["Later (2 points)", "Last"]


def test_formulas_are_typeset(read):
    reader = read(
        [
            new_markdown_cell(r"""# T

$W \in \mathbb{R}^{5\times 1}$ and

$$\begin{aligned} L &= \sum_i \lVert X_i W - y_i\rVert_2^2 \\
\hat w &= \arg\min_w \tfrac{1}{2} |w| \end{aligned}$$

$$ f(x) = \begin{cases} 1 & x \geq 0 \\ 0 & \text{otherwise} \end{cases} $$""")
        ]
    )
    text = text_of(reader)
    assert "∑" in text and "∈" in text and "ℝ" in text and "≥" in text and "otherwise" in text
    assert "\\" not in text and "$" not in text and "mathbb" not in text
    assert missing_glyphs(reader) == 0


def test_a_formula_wider_than_the_page_is_fitted(read):
    reader = read(
        [new_markdown_cell("# T\n\n$$ " + " + ".join(f"a_{{{i}}}" for i in range(60)) + " = b $$")]
    )
    assert right_edge(reader) < RIGHT_EDGE


def test_all_glyphs_exist_and_come_from_the_package(read):
    reader = read([new_markdown_cell(f"# T\n\n{SPECIAL} `{SPECIAL}` **bold** *italic*"),
                   code(f"# {SPECIAL}", stdout(SPECIAL + " █▌│"))])
    assert missing_glyphs(reader) == 0
    text = flat(text_of(reader))
    assert sum(text.count(flat(form)) for form in {SPECIAL, SPECIAL.replace("µ", "μ")}) == 4
    fonts = {font["/BaseFont"].split("+")[-1] for page in reader.pages
             for font in (f.get_object() for f in page["/Resources"]["/Font"].values())}
    assert all(re.match("LibertinusSerif|NewCM|DejaVuSansMono", name) for name in fonts)


def test_the_check_for_missing_glyphs_can_fail(read, monkeypatch):
    compile_ = typst.compile
    monkeypatch.setattr(typst, "compile", lambda file, pdf_standards=None, **options:
                        compile_(file, **options))
    assert missing_glyphs(read([new_markdown_cell("# T\n\nno font has this: \U0001fae8")])) == 1


def test_long_lines_wrap_and_lose_nothing(read):
    token = "".join(f"{i:03d}x" for i in range(120))  # 480 characters without a place to break
    prose = " ".join(f"word{i}" for i in range(80))
    reader = read([new_markdown_cell(f"# T\n\n{token} `{token}`"),
                   code(f"value = '{token}'\n    # {prose}", stdout(f"{token}\n{prose}"))])
    text = text_of(reader)
    assert "\u200b" not in text
    assert flat(text).count(token) == 4 and flat(text).count(flat(prose)) == 2
    assert right_edge(reader) < RIGHT_EDGE


def test_long_code_goes_on_over_pages(read):
    reader = read(
        [new_markdown_cell("# T"), code("\n".join(f"line_{i} = {i}" for i in range(150)))]
    )
    pages = [page.extract_text() for page in reader.pages[1:]]
    assert sum("line_" in page for page in pages) >= 2
    assert all(f"line_{i}={i}" in flat("".join(pages)) for i in range(150))


def test_no_line_of_a_long_listing_stands_alone(read):
    cells = []
    for i in range(40):  # the room left on the page differs each time
        filler = "filler\n\n" * (25 if i < 20 else 10) + "## T\n\n" * (i % 2) + "<br>" * (i % 20)
        cells += [new_markdown_cell(f"# T\n\n{filler}."),
                  code("\n".join(f"line_{i}_{j} = 0" for j in range(40)))]
    pages = [page.extract_text() for page in read(cells).pages]
    counts = [len(re.findall(rf"line_{i}_", page)) for i in range(40) for page in pages]
    assert 1 not in counts and sum(0 < count < 40 for count in counts) > 20


# ---------------------------------------------------------------- tables and figures


def test_all_tables_have_one_size_of_type_and_lose_nothing(read):
    header = ["layer"] + [f"q = {i} %" for i in range(10)]
    rows = [[f"body_op.{i}.conv1"] + [f"9{i}.{j:02d}" for j in range(10)] for i in range(4)]
    reader = read(
        [new_markdown_cell("# T"), code("n", table(header[:2], [row[:2] for row in rows]))],
        [new_markdown_cell("# T"), code("w", table(header, rows))])
    for page in reader.pages[1:3]:
        assert {round(float(size), 1) for _, _, size in drawn(page)[0]} >= {8.0}
        assert not {size for _, _, size in drawn(page)[0] if size < 7.4}
    assert right_edge(reader) < RIGHT_EDGE
    lines = [flat(line) for line in reader.pages[2].extract_text().splitlines()]
    assert all(flat("".join(row)) in "".join(lines) for row in rows)


def test_a_listing_of_up_to_25_lines_is_not_split(read):
    for lines in (5, 25):
        cells = [new_markdown_cell("# T")]
        for i in range(9):
            cells.append(code("\n".join(f"line_{i}_{j} = 0" for j in range(lines))))
        pages = [page.extract_text() for page in read(cells).pages]
        for i in range(9):
            assert sum(f"line_{i}_" in page for page in pages) == 1


@pytest.mark.parametrize("columns, words", [(3, 40), (24, 1)])
def test_tables_that_fit_in_no_type_wrap_within_the_page(read, columns, words):
    cell = " ".join(["sparsity99"] * words)
    reader = read([new_markdown_cell("# T"), code("t", table(["h"] * columns, [[cell] * columns]))])
    assert (
        sum(flat(page.extract_text()).count("99") for page in reader.pages[1:]) == columns * words
    )
    assert right_edge(reader) < RIGHT_EDGE


def test_long_tables_repeat_their_header_and_keep_all_rows(read):
    rows = [[f"row{i}", f"0.{i:03d}"] for i in range(100)]
    reader = read([new_markdown_cell("# T"), code("t", table(["layer", "sparsity"], rows))])
    pages = [text for text in (page.extract_text() for page in reader.pages[1:]) if "row" in text]
    assert len(pages) >= 2 and all("sparsity" in page for page in pages)
    assert all(f"row{i}0.{i:03d}" in flat("".join(pages)) for i in range(100))


def test_figures_are_readable_and_inside_the_page(read):
    cases = [(5, 3, 100), (5, 3, 200), (10, 3, 100), (5, 14, 100)]  # width, height, dpi
    reader = read([new_markdown_cell("# T"), *(code("plot()", figure(*case)) for case in cases)])
    pictures = [size for page in reader.pages for size in drawn(page)[1]]
    assert len(pictures) == len(cases)
    for (width, height, dpi), (w, h, lower) in zip(cases, pictures):
        case = f"{width} x {height} inches, {dpi} dpi"
        assert w / h == pytest.approx(width / height, rel=0.01), case
        assert w < TEXT_WIDTH + 0.5 and h < 9 * 72 and lower > 0.9 * 72, case
        if (width, height) == (5, 3):
            assert 0.55 < w / TEXT_WIDTH < 0.65, case
        else:
            assert w > 0.99 * TEXT_WIDTH or h > 7 * 72, case
    assert "<Figure>" not in text_of(reader)


def test_a_figure_stays_on_the_page_of_its_code(read):
    cells = [new_markdown_cell("# T")]
    for i in range(8):  # the room left on the page differs each time
        cells += [
            new_markdown_cell("filler text. " * 70 * (i % 4 + 1)),
            code(f"plot_{i}()", stdout("done"), figure()),
        ]
    pages = [
        (len(re.findall(r"plot_\d", page.extract_text())), len(drawn(page)[1]))
        for page in read(cells).pages
    ]
    assert sum(figures for _, figures in pages) == 8
    assert all(cells == figures for cells, figures in pages)


@pytest.mark.parametrize("led_to", [
    table(["h"], [[f"row {i}"] for i in range(8)] + [["LEDTO"]]),
    stdout("\n".join(["line"] * 8 + ["LEDTO"])),
    figure(),
    display(text_markdown="**Answer.** LEDTO", text_plain="A"),
    display(text_markdown="**Answer: LEDTO** it is.", text_plain="A"),
], ids=["table", "output", "figure", "answer", "answer of Lab 1"])
def test_a_text_stays_with_what_it_leads_to(read, led_to):
    cells = [new_markdown_cell("# T"), code("no_question")]
    for i in range(60):  # the room left on the page differs each time
        cells += [new_markdown_cell("filler\n\n" * (i % 7 + 20)), new_markdown_cell("LEADS here."),
                  captioned(code("t", led_to), "LEDTO.", "alt")]
        cells[-1].metadata["tags"] = ["remove-input"]
    pages = [page.extract_text() for page in list(read(cells).pages)[1:]]
    assert sum(page.count("LEADS") for page in pages) == 60
    assert all(page.count("LEADS") == page.count("LEDTO") for page in pages)


def test_a_question_and_its_answer_are_on_one_page(read):
    cells = [new_markdown_cell("# T")]
    for i in range(60):
        cells.append(new_markdown_cell("filler\n\n" * (i % 7 + 20)))
        asked = "ASKED " + "word " * 40 + "\n\n$$ W = 1 $$\n\n" + "word " * 20
        cells.append(new_markdown_cell(f"## Question\n\n{asked}\n\nPlot it.\n\n**Answer.** DONE."))
    pages = [page.extract_text() for page in list(read(cells).pages)[2:]]
    assert sum(page.count("ASKED") for page in pages) == 60
    assert all(page.count("ASKED") == page.count("DONE") for page in pages)


def test_figures_stand_before_the_listings_that_lead_to_them(read):
    drawing = captioned(code("plot(1)", figure(), figure()), "DRAWN one.", "alt")
    printing = captioned(code("plot(2)", stdout("printed"), figure()), "DRAWN two.", "alt")
    text = text_of(read([new_markdown_cell("# T"), code("alone()"), new_markdown_cell("Text."),
                         code("def first"), code("def second"), drawing, printing]))
    order = ("alone()", "Text.", "DRAWN one.", "def first", "def second", "plot(1)", "plot(2)",
             "printed", "DRAWN two.")
    assert sorted(order, key=text.index) == list(order)


def test_an_answer_is_not_split(read):
    cells = [new_markdown_cell("# T")]
    for i in range(60):
        cells.append(new_markdown_cell("filler\n\n" * (i % 7 + 20)))
        cells.append(new_markdown_cell("**Answer.** BEGIN " + "word " * 70 + "END."))
    pages = [page.extract_text() for page in list(read(cells).pages)[1:]]
    assert sum(page.count("BEGIN") for page in pages) == 60
    assert all(page.count("BEGIN") == page.count("END") for page in pages)


def test_no_line_ends_before_a_percent_sign_or_within_an_option(read):
    percents = " and ".join("word " * (i % 7) + f"93.{i} % of" for i in range(60))
    options = " and ".join("word " * (i % 7) + "`run -m name --int8`" for i in range(60))
    text = text_of(read([new_markdown_cell(f"# T\n\n{percents}\n\n**{percents}**\n\n{options}")]))
    lines = text.splitlines()
    assert len(lines) > 30 and text.count("%") == 120 and flat(text).count("-mname--int8") == 60
    assert not any(re.match(r"\s*(%|m name|int8)", line) for line in lines)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def refused(tmp_path):
    """Assert that exporting raises a matching ReportError and leaves the old report and the folder
    as they were.
    """

    def refused(folder, message, out="report.pdf"):
        (tmp_path / "report.pdf").write_bytes(b"old report")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ReportError, match=message):
            export("report.pdf", folder, tmp_path / out)
        assert (tmp_path / "report.pdf").read_bytes() == b"old report"
        assert sorted(tmp_path.rglob("*")) == before

    return refused


@pytest.mark.parametrize(
    "cell, message",
    [
        (new_code_cell("x = 1"), "cell 2 was not executed"),
        (
            code(
                "1 / 0",
                new_output(
                    "error", ename="ZeroDivisionError", evalue="division by zero", traceback=[]
                ),
            ),
            "cell 2 stopped with ZeroDivisionError: division",
        ),
        (code("x", display(application_json="{}")), "cell 2 shows only application/json"),
        (new_markdown_cell("![a plot](plot.png)"), "cell 2 has the image plot.png"),
        (new_markdown_cell("H<sub>2</sub>O"), "cell 2 has HTML, '<sub>'"),
        (new_markdown_cell("<table><tr><td>1</td></tr></table>"), "cell 2 has HTML, '<table>"),
        (new_markdown_cell('<img src="plot.png" width="90"> x'), "cell 2 has HTML, '<img src"),
        (new_markdown_cell("<!-- a --> <!-- b\n\n--> <table></table>"), "cell 2 has HTML, '<tab"),
        (code("x", display(text_html="<b>x</b>")), "cell 2 shows only text/html"),
        (
            new_markdown_cell("\\begin{align} a &= b \\end{align}"),
            "cell 2 has a formula outside dollar signs",
        ),
    ],
)
def test_unfit_cells_are_refused_by_name(write, refused, cell, message):
    refused(write([], [new_markdown_cell("# T"), cell]), rf"lab1_sparse_linear\.ipynb, {message}")


def unreadable(form):
    """A cell that only Typst refuses."""
    if form == "depth":
        return new_markdown_cell(">" * 80 + " deep")
    buffer = io.BytesIO()
    Image.new("CMYK" if form == "CMYK" else "RGB", (90, 60)).save(buffer, "jpeg")
    data = base64.b64encode(buffer.getvalue()[:None if form == "CMYK" else 99]).decode()
    if form == "in Markdown":
        return new_markdown_cell(f"![x](data:image/jpeg;base64,{data})")
    return code("plot()", display(image_jpeg=data))


@pytest.mark.parametrize("form, before", [
    ("CMYK", 0), ("cut off", 1), ("in Markdown", 2), ("depth", 3)])
def test_what_typst_cannot_read_is_refused_by_name(write, refused, form, before):
    cells = [new_markdown_cell("# T"), *(code("plot()", figure()) for _ in range(before)),
             unreadable(form), code("plot()", figure()), new_markdown_cell("$\\nosuchmacro$")]
    refused(write([], cells), rf"lab1_sparse_linear\.ipynb, cell {before + 2}: Typst refused it")


@pytest.mark.parametrize("bad", range(-1, 6))
def test_the_piece_that_typst_refuses_is_found_wherever_it_stands(monkeypatch, bad):
    """-1: the cover."""
    def compile_(pieces, *_):
        if bad == -1 or len(pieces) > bad:
            raise export_report.Refusal(f"{len(pieces)} pieces")

    monkeypatch.setattr(export_report, "_compile", compile_)
    pieces = [SimpleNamespace(where=f"cell {i}") for i in range(6)]
    error = export_report._placed("all", pieces, None, None)
    place = "STUDENT or NETID, on the cover" if bad == -1 else f"cell {bad}"
    assert str(error).startswith(f"{place}: ")


def test_unreadable_formula_is_refused(write, refused):
    refused(write([new_markdown_cell("# T\n\n" + r"$\nosuchmacro{\text{as it is}}$")]),
            r"\\nosuchmacro\{\\text\{as it is\}\}")


def test_empty_code_cells_need_no_execution(read):
    assert len(read([new_markdown_cell("# T"), new_code_cell(" \n")]).pages) == 4


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_missing_notebook_is_named(write, refused, name):
    folder = write()
    (folder / name).unlink()
    refused(folder, rf"{re.escape(name)} is missing: .*make report.*--from")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', '{"worksheets": []}', "\0"])
def test_broken_notebook_is_named(write, refused, text):
    folder = write()
    (folder / "hw4.ipynb").write_text(text)
    refused(folder, r"hw4\.ipynb is no readable notebook")


@pytest.mark.parametrize("out", ["folder", "report.pdf/inside.pdf"])
def test_unwritable_output_is_named(write, refused, tmp_path, out):
    (tmp_path / "folder").mkdir()
    refused(write(), rf"cannot write .*{out} .*--out", out)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_report(write, refused, monkeypatch, step):
    folder = write()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # "fsync": the file is there when the disk turns out to be full.
    monkeypatch.setattr(os, step, full)
    refused(folder, "No space left on device")


# ---------------------------------------------------------------- command line


@pytest.mark.slow
def test_command_line_is_quick_and_its_report_small(write, tmp_path):
    cells = [new_markdown_cell("# 3 Lab 2: Pruning (25 points)")]
    for i in range(30):
        cells += [
            new_markdown_cell(
                f"## ({i}) Question (1 point)\n\n" + r"Loss $\sum_i (x_i - y_i)^2$. " * 20
            ),
            code("value = function('text')  # comment\n" * 15, stdout("ok"), figure()),
            code("t", table(["a", "b", "c"], [[1, 2, 3]] * 12)),
        ]
    cells += [code("noise", figure(noise=True))]
    folder, out = write([], [], cells), tmp_path / "out"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "report.export", "--from", folder, "--out", out]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    for document, line in zip(DOCUMENTS, done.stdout.splitlines()):
        pages = len(PdfReader(out / document).pages)
        assert re.fullmatch(rf"{re.escape(str(out / document))}: {pages} pages, \d\.\d\d MB", line)
    # seconds of CPU, whatever else runs
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 5
    assert (out / "report.pdf").stat().st_size < 5e6


def test_command_line_names_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"error: .*true_false\.ipynb is missing"):
        export_report.main(["--from", str(tmp_path), "--out", str(tmp_path)])
    assert capsys.readouterr().out == "" and not (tmp_path / "report.pdf").exists()


# ---------------------------------------------------------------- tags, results, two documents


def tagged(cell, *tags):
    cell.metadata["tags"] = list(tags)
    return cell


def test_tags_leave_out_cells_inputs_and_outputs(read):
    text = flat(text_of(read([
        new_markdown_cell("# T"), tagged(new_markdown_cell("gone words"), "remove-cell"),
        tagged(code("gone_code", stdout("gone_output")), "remove-cell"),
        tagged(code("hidden_input", stdout("kept_output")), "remove-input"),
        tagged(code("kept_input", stdout("hidden_output")), "remove-output"),
        tagged(code("both_kept", stdout("and_this")), "nbval-ignore-output")])))
    assert "gone" not in text and "hidden" not in text
    assert all(word in text for word in ("kept_output", "kept_input", "both_kept", "and_this"))


def test_results_are_what_answers_say_in_short(read):
    answer = new_output("display_data", {"text/markdown": "**Answer.** long words"},
                        metadata={"in_short": "91.63 % at last"})
    reader = read([new_markdown_cell("# One\n\n## a (4 points)\n\n**True.** Because."),
                   new_markdown_cell("## b (1 point)\n\n**Bold.** No result."),
                   tagged(code("answer(...)", answer), "remove-input"),
                   new_markdown_cell("## c (1 point)\n\n**Answer: it is $x$, dense.** So.")])
    cover = flat(reader.pages[0].extract_text())
    assert flat("a True 4 2") in cover and flat("b 91.63 % at last 1 2") in cover
    assert flat("c it is") in cover and "longwords" not in cover and "Nores" not in cover


def test_what_follows_the_tag_further_goes_into_the_other_document(write, tmp_path):
    cells = [new_markdown_cell("# 1 True/False\n\nverdicts"),
             tagged(new_markdown_cell("# Experiments"), "further"), new_markdown_cell("measured")]
    folder, texts, covers = write(cells), {}, []
    for document in DOCUMENTS:
        export(document, folder, tmp_path / document)
        reader = PdfReader(tmp_path / document)
        texts[document] = flat(text_of(reader))
        covers.append((reader.outline[0].title, "Points" in reader.pages[0].extract_text()))
    assert covers == [("Results", True), ("Contents", False)]
    assert "verdicts" in texts["report.pdf"] and "measured" not in texts["report.pdf"]
    assert "measured" in texts["further.pdf"] and "verdicts" not in texts["further.pdf"]
    assert part_of(cells, "report.pdf") == [(1, cells[0])]


def test_figures_of_all_forms_are_drawn(read):
    heights = {"png": 60, "jpeg": 45, "gif": 30, "svg+xml": 20}  # which tell them apart
    cells = [new_markdown_cell("# T")]
    for form, height in heights.items():
        if form == "svg+xml":
            data = (f'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="{height}">'
                    f'<rect width="90" height="{height}" fill="#123456"/></svg>')
        else:
            buffer = io.BytesIO()
            Image.new("RGB", (90, height), "#fedcba").save(buffer, form)
            data = base64.b64encode(buffer.getvalue()).decode()
        cells.append(code("plot()", new_output(
            "display_data", {f"image/{form}": data, "text/plain": "<Figure size 90x60>"})))
    reader = read(cells)
    assert "<Figure" not in text_of(reader)
    pictures = drawn(reader.pages[1])[1]  # an SVG is drawn in lines and areas
    assert [w / h for w, h, _ in pictures] == pytest.approx([90 / 60, 90 / 45, 90 / 30])
    colours = [operands for operands, operator in operations(reader.pages[1]) if operator == b"scn"]
    assert any([round(255 * float(part)) for part in colour if not isinstance(part, str)]
               == [0x12, 0x34, 0x56] for colour in colours), colours


@pytest.mark.parametrize("text", ["<Figure size 640x480 with 1 Axes>",
                                  "<pandas.io.formats.style.Styler at 0x7f0>",
                                  "<IPython.core.display.HTML object>"])
def test_an_output_that_is_only_an_objects_name_is_refused(write, refused, text):
    cell = code("x", display(text_plain=text))
    refused(
        write([], [new_markdown_cell("# T"), cell]), "lab1_sparse_linear.ipynb, cell 2 shows only"
    )


# ---------------------------------------------------------------- what students bring


def png(color="#123456"):
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), color).save(buffer, "png")
    return buffer.getvalue()


def test_formulas_of_outputs_are_typeset(read):
    latex = display(
        text_plain="<IPython.core.display.Latex object>", text_latex=r"$\alpha \in X$"
    )
    text = flat(text_of(read([new_markdown_cell("# T"), code("x", latex)])))
    assert "∈" in text and "object" not in text


def test_dollars_are_read_as_jupyter_reads_them(read):
    cases = {
        "$ \\mu $ is small": "𝜇 is small",
        "3$\\times$3 kernel, 5$\\times$1": "3×3 kernel, 5×1",
        "$ x $ and prose between, $ y $": "𝑥 and prose between, 𝑦",
        "it costs \\$5 and `$HOME`": "it costs $5 and $HOME",
        "before <!-- silent --> after<br>next": "before after next",
    }
    reader = read([new_markdown_cell("# T"), *numbered(cases)])
    for source, shown in shown_between(reader, cases):
        assert flat(cases[source]) in shown, source


def test_images_in_markdown_are_taken_over(read, tmp_path):
    (tmp_path / "plot.png").write_bytes(png("#ff0000"))
    uri = "data:image/png;base64," + base64.b64encode(png("#00ff00")).decode()
    attached = new_markdown_cell("![attached](attachment:a.png)")
    attached["attachments"] = {"a.png": {"image/png": base64.b64encode(png("#0000ff")).decode()}}
    reader = read([new_markdown_cell("# T\n\n![local](plot.png)\n\n![uri](" + uri + ")"), attached])
    assert len(drawn(reader.pages[1])[1]) == 3


def test_images_may_have_spaces_in_their_names(read, tmp_path):
    (tmp_path / "my plot.png").write_bytes(png("#ff0000"))
    attached = new_markdown_cell("![attached](attachment:my%20image.png)")
    attached["attachments"] = {
        "my image.png": {"image/png": base64.b64encode(png("#0000ff")).decode()}}
    local = new_markdown_cell("# T\n\n![a](my%20plot.png)\n\n![b](<my plot.png>)")
    reader = read([local, attached])
    assert len(drawn(reader.pages[1])[1]) == 3


def test_an_error_names_notebook_and_cell_and_prints_no_data_uri(write, refused):
    uri = "data:image/bmp;base64," + "A" * 5000
    refused(write([], [new_markdown_cell("# T"), new_markdown_cell("![x](" + uri + ")")]),
            r"lab1_sparse_linear.ipynb, cell 2 has the image data:image/bmp.{,80}, which")
    error = new_output("error", ename="ValueError", evalue=f"no image: {uri}.", traceback=[])
    refused(write([], [], [code("x", error)]),
            r"hw4\.ipynb, cell 1 stopped with ValueError: no image: data:image/bmp.{,80}\.; mend")
    refused(write([], [], [new_markdown_cell(r"$\nosuchmacro{\text{" + uri + "}}$")]),
            r"(?s)hw4\.ipynb, cell 1: (?!.*A{60})")
    refused(write([], [], [new_markdown_cell("# T"), new_markdown_cell(r"$\\nosuchmacro{x}$")]),
            r"hw4\.ipynb, cell 2: .*nosuchmacro")


def test_a_machine_on_which_no_pandoc_runs_is_told_what_to_install(write, refused, monkeypatch):
    monkeypatch.setattr(pypandoc, "__pandoc_path", None)  # what an earlier export found
    monkeypatch.setenv("PYPANDOC_PANDOC", os.devnull)  # there, but no program
    refused(write([new_markdown_cell("# T")]), "no pandoc runs .* `brew install pandoc`")


def test_a_code_cell_without_outputs_is_an_error_of_ours(write, refused):
    folder = write()
    path = folder / "hw4.ipynb"
    path.write_text('{"cells": [{"cell_type": "code", "source": "1", "metadata": {}}]}')
    refused(folder, r"hw4\.ipynb, cell 1 has no list of outputs")


@pytest.mark.parametrize("outputs", [[{}], ["text"], [{"output_type": "error"}]], ids=str)
def test_an_output_that_is_none_makes_a_notebook_unreadable(write, refused, outputs):
    folder = write()
    cell = {"cell_type": "code", "source": "1", "metadata": {}, "outputs": outputs}
    (folder / "hw4.ipynb").write_text(json.dumps({"cells": [cell]}))
    refused(folder, r"hw4\.ipynb is no readable notebook of version 4")


# ---------------------------------------------------------------- characters that fonts lack


@pytest.fixture
def system_fonts(monkeypatch, tmp_path):
    """Let the system's fonts be one that has the given characters; return what it was asked for."""
    compile_, asked = typst.compile, []

    def install(characters):
        if characters:
            builder, pen = FontBuilder(1000, isTTF=True), TTGlyphPen(None)
            for point in ((0, 0), (0, 800), (800, 800), (800, 0)):
                (pen.moveTo if point == (0, 0) else pen.lineTo)(point)
            pen.closePath()
            names = [".notdef", *(f"u{ord(character):X}" for character in characters)]
            builder.setupGlyphOrder(names)
            builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:])))
            builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
            builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
            builder.setupHorizontalHeader(ascent=800, descent=-200)
            builder.setupNameTable({"familyName": "Squares", "styleName": "Regular",
                                    "psName": "Squares"})
            builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
            builder.setupPost()
            (tmp_path / "fonts").mkdir()
            builder.save(tmp_path / "fonts" / "squares.ttf")

        def compile_with(file, ignore_system_fonts=False, font_paths=(), **options):
            asked.append(not ignore_system_fonts)
            fonts = [] if ignore_system_fonts or not characters else [tmp_path / "fonts"]
            return compile_(file, ignore_system_fonts=True, font_paths=fonts, **options)

        monkeypatch.setattr(typst, "compile", compile_with)
        return asked

    return install


def test_names_in_any_script_are_drawn_if_the_system_can(read, system_fonts):
    asked = system_fonts("李明김🦊")
    cells = [new_markdown_cell("# T\n\n明 in text"), code("fox = '🦊'", stdout("🦊"))]
    reader = read(cells, student="李明 Ada 김")
    assert "李明Ada김" in flat(reader.pages[0].extract_text())
    assert text_of(reader).count("🦊") == 2 and missing_glyphs(reader) == 0
    assert reader.metadata.author == "李明 Ada 김" and asked == [False, True]
    asked.clear()
    read(student="Ádám Łukasz Дарья Ωμέγα")
    assert asked == [False]


@pytest.mark.parametrize("where, character", [("STUDENT", "李"), ("NETID", "\u0600"),
                                              (r"hw4\.ipynb, cell 2", "🦊"),
                                              (r"hw4\.ipynb, cell 3", "김"),
                                              (r"hw4\.ipynb, cell 4", "明")])
def test_a_character_that_no_font_has_is_named(write, system_fonts, tmp_path, where, character):
    system_fonts("")
    has = {place: character if place in where else "" for place in
           ("STUDENT", "NETID", "cell 2", "cell 3", "cell 4")}
    drawing = ('<svg xmlns="http://www.w3.org/2000/svg" width="90" height="60">'
               f'<text x="9" y="20">fox {has["cell 4"]}</text></svg>')
    folder = write([], [], [new_markdown_cell("# T"), new_markdown_cell("fox " + has["cell 2"]),
                            code("x", stdout(has["cell 3"])),
                            code("x", display(**{"image_svg+xml": drawing}))])
    with pytest.raises(ReportError, match=f"{where}.*: no font here can draw '.+'") as error:
        export("report.pdf", folder, tmp_path / "report.pdf", student="A" + has["STUDENT"],
               netid="b" + has["NETID"])
    assert repr(character) in str(error.value)


# ---------------------------------------------------------------- captions


def alternative_texts(reader):
    """The alternative texts of a PDF's figures, in reading order."""

    def under(node):
        node = node.get_object()
        if isinstance(node, list):
            return [alt for child in node for alt in under(child)]
        if not isinstance(node, dict):
            return []
        alts = [str(node["/Alt"])] if node.get("/S") == "/Figure" else []
        return alts + (under(node["/K"]) if "/K" in node else [])

    return under(reader.trailer["/Root"]["/StructTreeRoot"]["/K"])


def test_figures_are_numbered_and_captioned(read):
    reader = read(
        [new_markdown_cell("# T"), code("no_caption", figure())],
        [new_markdown_cell("# U"), captioned(code("one", figure()), "One $x_1$ *is*.", "first"),
         captioned(code("three", *[figure()] * 3), "Three at once.", "second")],
        [captioned(code("last", figure(10)), f"Nasty {NASTY.split('_')[0]}] `#x`.", NASTY)])
    text = flat(text_of(reader))
    assert re.findall(r"Figure(\d+)\.", text) == ["1", "2", "3"]
    assert "Figure1.One𝑥1is." in text and 'Figure3.Nasty#"$*]#x.' in text
    assert alternative_texts(reader) == [
        "Figure drawn by the code of this cell", "first", "second", NASTY]
    tops = [top for page in reader.pages for *_, top in drawn(page)[1]]
    assert len(tops) == 6 and tops[2] == tops[3] > tops[4]  # of three, two stand side by side
    for page in list(reader.pages)[2:]:
        texts, pictures = drawn(page)
        captions = [y for _, y, size in texts if size == pytest.approx(9)]
        assert captions and min(captions) < min(lower for *_, lower in pictures)


def test_a_figure_of_many_pictures_goes_on_over_pages(read):
    cells = [new_markdown_cell("# T"), captioned(code("x", *[figure()] * 20), "Many.", "alt")]
    reader = read(cells)
    assert sum(len(drawn(page)[1]) for page in reader.pages) == 20
    texts, pictures = drawn(reader.pages[1])
    captions = [y for _, y, size in texts if size == pytest.approx(9)]
    assert min(captions) > max(lower for *_, lower in pictures)  # on the page where it begins
    assert all(lower > 0.9 * 72 for page in reader.pages for *_, lower in drawn(page)[1])


@pytest.mark.parametrize("metadata", [{"mystnb": 3}, {"mystnb": {"figure": "x", "image": None}}])
def test_other_metadata_are_no_caption(read, metadata):
    cell = code("x", figure())
    cell.metadata.update(metadata)
    assert "Figure" not in text_of(read([new_markdown_cell("# T"), cell]))


@pytest.mark.parametrize("caption", ["one\n\ntwo", "- a list", "# T"])
def test_a_caption_is_one_paragraph(write, refused, caption):
    cells = [new_markdown_cell("# T"), captioned(code("x", figure()), caption, "alt")]
    refused(write([], [], cells), r"hw4\.ipynb, cell 2 has a caption that is not one paragraph")


# ---------------------------------------------------------------- this repository's own report


@pytest.fixture(scope="module", params=DOCUMENTS)
def own(request, tmp_path_factory):
    """(name, reader, text) of a document made from the notebooks as they are stored."""
    out = tmp_path_factory.mktemp("own") / request.param
    export(request.param, REPOSITORY, out)
    reader = PdfReader(out)
    return request.param, reader, text_of(reader)


@pytest.mark.slow
def test_own_figures_have_captions_and_alternative_texts(own):
    document, reader, text = own
    expected = []
    for name in DOCUMENTS[document][1]:
        for number, cell in part_of(read_cells(REPOSITORY / name), document):
            if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                caption, alt = described(cell)
                assert caption.endswith(".") and alt.endswith("."), (name, number)
                expected.append(alt)
    assert len(expected) == {"report.pdf": 13, "further.pdf": 7}[document]
    assert alternative_texts(reader) == expected
    assert len(set(expected)) == len(expected)
    numbers = [int(n) for n in re.findall(r"Figure (\d+)\.", text)]
    assert numbers == list(range(1, len(expected) + 1))


@pytest.mark.slow
def test_own_pages_are_filled(own):
    """Each is at least half full, but for a section's last, and none ends with a heading."""
    _, reader, _ = own
    assert len(reader.pages) <= 30
    starts = {reader.get_destination_page_number(item) for item in reader.outline
              if not isinstance(item, list)}
    for number, page in enumerate(reader.pages[:-1]):
        texts, pictures = drawn(page)
        y, size = min((y, size) for _, y, size in texts if y > 0.95 * 72)
        lowest = min([y, *(lower for *_, lower in pictures)])
        assert number + 1 in starts or lowest < (0.95 + 9.05 / 2) * 72, number + 1
        assert lowest < y or size not in (11, 13), number + 1


@pytest.mark.slow
@pytest.mark.parametrize("own", ["report.pdf"], indirect=True)
def test_own_questions_of_lab_1_have_answer_figure_and_code_in_this_order(own):
    lab_1 = own[2].split("(a) Gradient of the loss and the update")[2].split("3 Lab 2")[0]
    parts = re.split(r"\n\([b-f]\) .*\(\d points\)", lab_1)[1:]
    assert len(parts) == 5
    for part in parts:
        at = [part.index(word) for word in ("Answer:", "Figure", "def ")]
        assert at == sorted(at), part


@pytest.mark.slow
def test_own_text_has_no_character_that_a_reader_cannot_see(own):
    _, reader, text = own
    assert not re.search("[\u200b-\u200d\u2060\ufeff]", text)
    assert missing_glyphs(reader) == 0
