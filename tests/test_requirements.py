"""requirements.lock pins what requirements.txt asks for, within its bounds, for all platforms."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def requirements(name):
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


LOCKED = requirements("requirements.lock")


def on(python, platform, machine):
    """The environment that a requirement's marker is evaluated in."""
    return default_environment() | {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform,
        "platform_machine": machine,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform]}


def holds(requirement, environment):
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.14"])
@pytest.mark.parametrize("platform, machine", [
    ("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"),
])
def test_each_requirement_is_pinned_once_within_its_bounds(python, platform, machine):
    environment = on(python, platform, machine)
    for wanted in requirements("requirements.txt"):
        pins = [str(pin.specifier) for pin in LOCKED if holds(pin, environment)
                and canonical(pin.name) == canonical(wanted.name)]
        assert len(pins) == holds(wanted, environment), wanted
        assert all(pin.startswith("==") and wanted.specifier.contains(pin[2:], prereleases=True)
                   for pin in pins), wanted


def test_the_lock_names_no_place_to_fetch_from():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "--" not in text and "file:" not in text


def test_torch_is_the_version_that_was_tested():
    pins = {pin.name: str(pin.specifier) for pin in LOCKED}
    assert (pins["torch"], pins["torchvision"]) == ("==2.14.1", "==0.29.1")
