"""Work that takes long is named while it goes on."""

import time

import pytest

from pipeline.cluster import room


def test_silence_is_broken_by_the_work_that_is_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_SILENT_SECONDS", 0.05)
    with room.announced("starting 1 vLLM engine"):
        while not (out := capsys.readouterr().out):
            time.sleep(0.01)
        assert out == "starting 1 vLLM engine ...\n"
    assert capsys.readouterr().out.startswith("starting 1 vLLM engine: ")
    monkeypatch.setattr(room, "_SILENT_SECONDS", 60.0)
    with room.announced("something short"):
        pass
    assert capsys.readouterr().out == ""
