import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs.verbs.doctor import compiler, languages, packages, report
from rewards.sandbox.toolchains import LANGUAGES


def test_the_packages_of_this_environment_are_as_pinned() -> None:
    findings = {finding.subject: finding for finding in packages()}
    assert {"deepspeed", "ray", "torch", "transformers", "ruff"} <= set(findings)
    assert not [finding for finding in findings.values() if finding.missing]
    assert findings["deepspeed"].required and not findings["ruff"].required


def test_languages_are_those_that_tasks_may_name() -> None:
    findings = {finding.subject: finding for finding in languages()}
    assert set(findings) == {"sandbox", *(f"language {name}" for name in LANGUAGES)}
    assert not findings["language python"].missing and not findings["sandbox"].missing


def test_a_missing_compiler_is_required_and_a_missing_language_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = {finding.subject: finding.required for finding in [*compiler(), *languages()] if finding.missing}
    assert missing["g++"] and not missing["language c"]
    text = io.StringIO()
    assert report(Console(file=text, width=120)) == 1
    assert "missing: g++" in text.getvalue()


def test_a_broken_language_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "go").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    [go] = [finding for finding in languages() if finding.subject == "language go"]
    assert go.missing and not go.required and "doesn't work" in go.purpose


def test_the_memory_limiter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.sandbox.box.parents", lambda: None)
    assert next(languages()).state == "bubblewrap works, memory by looking every 20 ms"
