import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs.doctor import doctor, packages, tools


def test_the_packages_of_this_environment_are_as_pinned() -> None:
    findings = {finding.subject: finding for finding in packages()}
    assert {"deepspeed", "ray", "torch", "transformers", "ruff"} <= set(findings)
    assert not [finding for finding in findings.values() if finding.missing]
    assert findings["deepspeed"].required and not findings["ruff"].required


def test_a_missing_compiler_is_required_and_a_missing_sandbox_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = {finding.subject: finding.required for finding in tools() if finding.missing}
    assert missing["g++"] and not missing["bwrap"]
    text = io.StringIO()
    assert doctor(Console(file=text, width=120)) == 1
    assert "missing: g++" in text.getvalue()
