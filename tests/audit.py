"""Every installed package against the known vulnerabilities (`make lint`); an audit that got no
answer says so.

pip-audit reports a package that its service does not know as skipped, and a service out of reach as
a traceback; neither says that nothing was checked. Options are passed on to pip-audit, for example
`-s osv`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def installed():
    """Return the lines `name==version` of what pip installed here, without local versions such as
    +cpu.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "freeze"]
    frozen = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [re.sub(r"\+\S+$", "", line) for line in frozen.splitlines() if "==" in line]


def ask(packages, options=()):
    """Return pip-audit's list of dicts, one a package (name, version, vulns or skip_reason), or why
    there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed, answer = Path(folder, "installed.txt"), Path(folder, "answer.json")
        listed.write_text("\n".join(packages) + "\n")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            listed,
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--format",
            "json",
            "--output",
            answer,
            *options,
        ]
        process = subprocess.run(command, capture_output=True, text=True)
        if answer.exists():
            return json.loads(answer.read_text())["dependencies"]
        return (process.stderr.strip().splitlines() or ["no message"])[-1]


def verdict(answer):
    """Return (lines to print, exit status): 1 if a package is vulnerable or, in CI, if any was not
    checked.
    """
    in_ci = os.environ.get("CI", "") not in ("", "0", "false")
    if isinstance(answer, str):
        return [
            f"dependency audit NOT DONE: the vulnerability service gave no answer ({answer[:300]})"
        ], int(in_ci)
    found = [f"{package['name']} {package['version']}: {vuln['id']}, "
             f"fixed in {', '.join(vuln['fix_versions']) or 'no version yet'}"
             for package in answer for vuln in package.get("vulns", ())]
    skipped = [package["name"] for package in answer if "skip_reason" in package]
    checked = len(answer) - len(skipped)
    summary = f"dependency audit: {checked} packages checked, known vulnerabilities: {len(found)}"
    if skipped:
        summary = (
            f"dependency audit {'INCOMPLETE' if checked else 'NOT DONE'}: the vulnerability "
            f"service does not know {len(skipped)} of {len(answer)} packages "
            f"({', '.join(skipped[:3])}, ...)"
        )
    return [*found, summary], int(bool(found) or (bool(skipped) and in_ci))


if __name__ == "__main__":
    printed, status = verdict(ask(installed(), sys.argv[1:]))
    print(*printed, sep="\n")
    sys.exit(status)
