"""The dependency audit goes red for a vulnerable package, and never calls green what was not
checked.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import pytest

import audit

PACKAGES = ["numpy==1.26.0", "tqdm==4.66.0"]


@pytest.fixture
def service(monkeypatch):
    """A vulnerability service on this machine that speaks OSV's protocol and knows one flaw, in
    NumPy below 1.26.1.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"][
                "name"
            ]
            events = [{"introduced": "0"}, {"fixed": "1.26.1"}]
            affected = {"package": {"ecosystem": "PyPI", "name": "numpy"},
                        "ranges": [{"type": "ECOSYSTEM", "events": events}]}
            flaw = {"id": "OSV-0", "summary": "a flaw", "details": "a flaw", "affected": [affected]}
            answer = json.dumps({"vulns": [flaw]} if asked == "numpy" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield ["-s", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query"]
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_vulnerable_package_is_named_with_the_version_that_mends_it(service):
    lines, status = audit.verdict(audit.ask(PACKAGES, service))
    assert status == 1
    assert lines == ["numpy 1.26.0: OSV-0, fixed in 1.26.1",
                     "dependency audit: 2 packages checked, known vulnerabilities: 1"]


def test_a_service_out_of_reach_is_said_and_fails_in_ci_only(monkeypatch):
    answer = audit.ask(PACKAGES, ["-s", "osv", "--osv-url", "http://127.0.0.1:9/v1/query"])
    for in_ci in ("", "true"):
        monkeypatch.setenv("CI", in_ci)
        lines, status = audit.verdict(answer)
        assert len(lines) == 1 and "NOT DONE: the vulnerability service gave no answer" in lines[0]
        assert status == bool(in_ci)


@pytest.mark.parametrize("in_ci", ["", "true"])
@pytest.mark.parametrize("checked, word", [(0, "NOT DONE"), (1, "INCOMPLETE")])
def test_packages_that_the_service_does_not_know_are_not_called_checked(
    monkeypatch, checked, word, in_ci
):
    monkeypatch.setenv("CI", in_ci)
    known = [{"name": "tqdm", "version": "4.66.0", "vulns": []}] * checked
    lines, status = audit.verdict([*known, {"name": "numpy", "skip_reason": "not found"}])
    assert word in lines[0] and "1 of" in lines[0] and "numpy" in lines[0]
    assert status == bool(in_ci)


def test_without_a_flaw_it_passes():
    answer = [{"name": "tqdm", "version": "4.66.0", "vulns": []}]
    assert audit.verdict(answer) == (
        ["dependency audit: 1 packages checked, known vulnerabilities: 0"],
        0,
    )


def test_what_is_installed_is_what_is_asked_about():
    lines = audit.installed()
    assert f"numpy=={version('numpy')}" in lines
    assert not any("+" in line for line in lines)
