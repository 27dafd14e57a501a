"""Formulas: found as Jupyter finds them, their macros known to later ones, no word read as code."""

import functools
import json
import re
import tempfile
from pathlib import Path

import typst

__all__ = ["define_macros", "mark_dollars", "quote_words", "without_marks"]

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


BRACED = r"\{(?:\\.|[^{}\\])*\}"
for _ in range(4):  # braces in braces
    BRACED = rf"\{{(?:\\.|[^{{}}\\]|{BRACED})*\}}"
MACRO = re.compile(
    r"\\(?:(?:re)?newcommand|providecommand|DeclareMathOperator)\b\*?\s*"
    rf"\{{?\s*(\\(?:[A-Za-z]+|.))\s*\}}?\s*(?:\[\d\]\s*)?(?:\[[^\]]*\]\s*)?{BRACED}"
    rf"|\\def\s*(\\(?:[A-Za-z]+|.))((?:#\d)*)\s*({BRACED})", re.DOTALL)

# pandoc hands text in one of TeX's classes on without quotes: \mathop{\text{alpha}} would be α. So
# each word of a text, and each argument that a macro puts there, is marked, before macros are
# expanded, by characters that no text has.
BEGIN, END = "\ufdd0", "\ufdd1"
TEXT = re.compile(rf"(\\(?:text(?:rm|bf|it|sf|tt)?|[mh]box)\s*)({BRACED})", re.DOTALL)
WORD = re.compile(r"(\$[^$]*\$|\\[A-Za-z]+)|([^\W\d_]+|#\d)")  # not formulas in it, nor commands


def _mark_words(match):
    return match[1] + WORD.sub(lambda word: word[1] or BEGIN + word[2] + END, match[2])


def without_marks(text):
    """Return `text` as it was before its words were marked."""
    return re.sub(f"[{BEGIN}{END}]", "", text)


def define_macros(trees, pieces):
    """Let \\newcommand in one formula serve all later ones of its notebook, as MathJax does.

    trees: of the pieces, changed in place; words in their formulas' texts are marked.
    """
    macros = {}  # notebook: {name: definition}

    def define(match):
        if match[2]:  # \\def, in the form that pandoc reads
            arguments = f"[{len(match[3]) // 2}]" if match[3] else ""
            known[match[2]] = f"\\newcommand{{{match[2]}}}{arguments}{match[4]}"
        else:
            known[match[1]] = match[0]
        return ""

    def visit(node):
        if isinstance(node, dict) and node.get("t") == "Math":
            rest = MACRO.sub(define, TEXT.sub(_mark_words, node["c"][1]))
            node["c"][1] = "".join(known.values()) + rest
            if not rest.strip():
                node.update(t="Str", c="")
        else:
            for child in node.values() if isinstance(node, dict) else node:
                if isinstance(child, (dict, list)):
                    visit(child)

    for tree, piece in zip(trees, pieces):
        known = macros.setdefault(piece.where.rpartition(", cell ")[0], {})
        visit(tree)


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
    r"|(?P<dollar>\$)|(?P<close>\])"
    rf"|{BEGIN}(?P<text>[^{END}]*){END}"
    r"|(?P<word>[^\W\d_][^\W_]+)(?P<argument>(?=:))?(?:\.[a-z.]+)?", re.DOTALL)
PART = re.compile(r'"(?:\\.|[^"\\])*"|\\.|([^\W_]+)', re.DOTALL)
ARGUMENTS = {"align", "angle", "delim", "gap", "limits", "reverse", "size"}  # that pandoc names


def quote_words(text):
    """Return Typst in which each word of a formula that mathematics does not define is a string,
    and each that is marked.
    """
    modes = []  # "$", a formula; "[", text that a call within a formula holds

    def token(match):
        inside = modes[-1:] == ["$"]
        if match["dollar"]:
            modes.pop() if inside else modes.append("$")
        elif inside and match["opens"] == "[":
            modes.append("[")
        elif match["close"] and modes[-1:] == ["["]:
            modes.pop()
        elif match["text"]:
            return PART.sub(lambda part: f'"{part[1]}"' if part[1] else part[0], match["text"])
        elif inside and match["word"] and match["word"] not in _mathematics():
            if match["argument"] is None or match["word"] not in ARGUMENTS:
                return f'"{match[0]}"'
        return match[0]

    return without_marks(TOKEN.sub(token, text))
