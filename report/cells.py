"""Executed notebooks as lists of what each cell shows."""

import json
import re

PICTURES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg", "image/gif": "gif"}
# Of an output, the best first.
FORMS = ("text/markdown", *PICTURES, "text/latex", "text/plain", "stdout")
OBJECT = re.compile(r"<[\w.]+( object)?[^<>]*>")  # how an object without a form of its own prints


class ReportError(RuntimeError):
    """The report could not be made; the message names the file or argument and says what to do."""

    def __str__(self):
        return re.sub(r"(\bdata:\S{40})[\w+/=%-]+", r"\1...", super().__str__())


def clean(text):
    """Return text without ANSI codes, overwritten lines, control characters and lone surrogates."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text).encode("utf-8", "replace").decode("utf-8")


def read_cells(path):
    """Return a notebook's cells, their sources as text.

    Raises ReportError unless it is there, valid, wholly executed and without an error.
    """
    try:  # as JSON, since importing nbformat takes longer than all of the export
        cells = [{**cell, "source": "".join(cell["source"])}
                 for cell in json.loads(path.read_bytes())["cells"]]
        for number, cell in enumerate(cells, 1):
            if cell.get("cell_type") == "code" and cell["source"].strip():
                _check_executed(cell, f"{path}, cell {number}")
    except FileNotFoundError:
        raise ReportError(f"{path} is missing: run `make report`, or name the notebooks' folder "
                          "with --from") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is no readable notebook of version 4, execute it again: "
                          f"{error!r}") from error
    return cells


def _check_executed(cell, where):
    if not isinstance(cell.get("outputs"), list):
        raise ReportError(f"{where} has no list of outputs: execute the notebook again")
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            raise ReportError(f"{where} stopped with {output['ename']}: "
                              f"{clean(output['evalue'])}; mend it and execute the notebook again")
    if cell.get("execution_count") is None:
        raise ReportError(f"{where} was not executed: execute the notebook from top to bottom")


def tags(cell):
    """Return the tags of a cell; remove-input and others are those of Jupyter Book."""
    return cell.get("metadata", {}).get("tags", [])


def described(cell):
    """Return (caption, alternative text) of a cell's pictures, "" for one that its metadata lack.

    They stand where MyST-NB and Jupyter Book read them.
    """
    found = []
    for keys in (("mystnb", "figure", "caption"), ("mystnb", "image", "alt")):
        value = cell.get("metadata", {})
        for key in keys:
            value = value.get(key, "") if isinstance(value, dict) else ""
        found.append(clean(str(value)).strip())
    return tuple(found)


def shown(cell, where):
    """Return [[form, content, in short]] of what a cell shows; form: "code" or one of FORMS.

    Raises ReportError for an output in none of FORMS.
    """
    if "remove-cell" in tags(cell) or cell["cell_type"] not in ("code", "markdown"):
        return []
    if cell["cell_type"] == "markdown":
        return [["text/markdown", clean(cell["source"]).strip("\n"), None]]
    parts = []
    if "remove-input" not in tags(cell):
        parts.append(["code", cell["source"], None])
    for output in cell["outputs"] if "remove-output" not in tags(cell) else []:
        forms = output.get("data") or {output.get("name", "nothing"): output.get("text", "")}
        form = next((form for form in FORMS if form in forms), None)
        text = "".join(forms.get(form, ""))
        if "stderr" in forms or (any("widget" in name for name in forms) and form == "text/plain"):
            continue  # a live bar has no useful text form
        if form is None or (form == "text/plain" and OBJECT.fullmatch(text.strip())):
            raise ReportError(f"{where} shows only {', '.join(forms)}, {text.strip()[:60]!r}: "
                              f"display one of {', '.join(FORMS)}")
        if parts and form == parts[-1][0] == "stdout":
            parts[-1][1] += text
        else:
            parts.append([form, text, output.get("metadata", {}).get("in_short")])
    parts = [[form, clean(text).strip("\n").rstrip(), short] for form, text, short in parts]
    return [part for part in parts if part[1].strip()]
