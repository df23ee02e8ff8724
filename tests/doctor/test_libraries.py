"""Libraries against declared ranges; the installed package and the checkout declare the same."""

import pytest

from megakd.doctor import libraries
from megakd.doctor.libraries import Declared, check_libraries, read_declared


def rows(monkeypatch, declared: Declared, installed: dict[str, str]) -> list[tuple[str, str, str]]:
    monkeypatch.setattr(libraries, "read_declared", lambda: declared)
    monkeypatch.setattr(libraries, "installed_version", installed.get)
    monkeypatch.setattr(libraries.platform, "python_version", lambda: "3.11.7")
    return [(found.mark, found.check, found.found) for found in check_libraries()]


def test_ranges_missing_and_optional(monkeypatch):
    declared = Declared(">=3.11,<3.13", ["torch>=2.11,<2.14", "numpy>=2.4,<3", "scipy>=1.17"], ["deepspeed==0.19.8"])
    found = rows(monkeypatch, declared, {"torch": "2.13.0+cpu", "numpy": "1.26.0"})
    assert found == [
        ("ok", "Python", "3.11.7"),
        ("ok", "libraries", "1 in their ranges (torch 2.13.0+cpu); optional, not installed: deepspeed"),
        ("fault", "numpy", "1.26.0, MegaKD needs <3,>=2.4"),
        ("fault", "scipy", "not installed, MegaKD needs >=1.17"),
    ]
    assert rows(monkeypatch, declared._replace(needed=[]), {"deepspeed": "0.20.0"})[2][:2] == ("fault", "deepspeed")


def test_another_python(monkeypatch):
    assert rows(monkeypatch, Declared(">=3.12", [], []), {})[0] == ("fault", "Python", "3.11.7, MegaKD needs >=3.12")


def test_the_installed_package_declares_what_the_checkout_does(monkeypatch, tmp_path):
    checkout = read_declared()
    assert any(each.startswith("torch") for each in checkout.needed)
    assert {each.partition("=")[0] for each in checkout.optional} >= {"deepspeed"}
    monkeypatch.setattr(libraries, "PROJECT", tmp_path / "none")
    try:
        installed = read_declared()
    except libraries.metadata.PackageNotFoundError:
        pytest.skip("MegaKD is not installed in this environment")
    names = [sorted(libraries.re.split("[<>=~!; ]", each)[0] for each in d.needed) for d in (checkout, installed)]
    assert names[0] == names[1] and not any("pytest" in each for each in installed.optional)
