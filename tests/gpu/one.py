"""Run a check in this process and write its verdict into a folder: `python -m tests.gpu.one CHECK_AS_JSON FOLDER`."""

import json
import sys
from pathlib import Path

from tests.gpu.check import Check, run_check

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    (folder / "verdict.json").write_text(json.dumps(run_check(Check(**json.loads(sys.argv[1])), folder)))
