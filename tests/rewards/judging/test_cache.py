"""Answers on disk: found by what was asked, whole or not at all, whoever writes beside."""

import subprocess
import sys
from pathlib import Path

import pytest

from rewards.judging.cache import AnswerCache

ASKED = {"model": "m", "messages": [{"role": "user", "content": "\ud800 caf\u00e9"}], "vote": 0}


def test_what_was_put_is_found_by_its_content(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "new" / "folder")
    assert cache.get(ASKED) is None
    cache.put(ASKED, "[[7]] \ud800")
    again = AnswerCache(tmp_path / "new" / "folder")
    assert again.get(dict(reversed(ASKED.items()))) == "[[7]] \ud800"
    assert again.get(ASKED | {"vote": 1}) is None and again.get(ASKED | {"model": "n"}) is None


def test_half_a_file_is_no_answer(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.put(ASKED, "[[7]]")
    [file] = tmp_path.glob("*/*.json")
    for content in (file.read_bytes()[:-5], b"", b"[]", b'{"answer": 7}'):
        file.write_bytes(content)
        assert cache.get(ASKED) is None
    cache.put(ASKED, "[[8]]")
    assert cache.get(ASKED) == "[[8]]"


def test_many_processes_may_write_the_same(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rewards.judging.cache import AnswerCache\n"
        "cache = AnswerCache(Path(sys.argv[1]))\n"
        "for n in range(200):\n"
        "    cache.put({'n': n % 5}, 'long ' * 1000)\n"
        "    assert cache.get({'n': n % 5}) == 'long ' * 1000\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(list(tmp_path.glob("*/*.json"))) == 5 and not list(tmp_path.glob("**/*.partial"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache='.*can't be written"):
        AnswerCache(tmp_path / "file" / "below")
