import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.disk.lock import holder, locked

HOLD = "import sys, time; from pathlib import Path; from pipeline.disk.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def test_a_second_writer_is_refused_with_the_first_ones_name_until_that_one_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        assert holder(tmp_path).startswith(f"process {other.pid} on ")
        with pytest.raises(ValueError, match=f"process {other.pid} on "), locked(tmp_path, wait_seconds=0.3):
            pass
        other.kill()
        with locked(tmp_path):  # waits until the killed one has ended
            assert holder(tmp_path)
    assert holder(tmp_path) == ""


def test_looking_does_not_take(tmp_path: Path) -> None:
    with locked(tmp_path):
        pass
    assert holder(tmp_path) == "" and holder(tmp_path / "none") == ""
    with locked(tmp_path, wait_seconds=0.0):
        assert holder(tmp_path)
