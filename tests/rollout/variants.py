"""Engines that need a process of their own, each measured in one."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.rollout import tiny

Gaps = dict[str, list[tuple[float, float]]]
"""Measured pairs of every variant."""
IN_CHILDREN = """
import json, os, sys
from pathlib import Path

root = Path(sys.argv[1])
for name, (*arguments, environment) in json.loads(sys.argv[2]).items():
    (root / name).mkdir()
    child = os.fork()  # a process for each, all with the imports of this one, which take longest
    if child == 0:
        os.environ.update(environment)
        (root / name / "gaps.json").write_text(json.dumps(measure(*arguments, root / name)))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def gaps_of(script: str, variants: Mapping[str, tuple[object, ...]], root: Path) -> Gaps:
    """Run `measure`, which `script` defines, with each variant's arguments and a folder below `root`, and return its
    gaps. The last entry of a variant is its environment."""
    command = [sys.executable, "-c", script + IN_CHILDREN, str(root), json.dumps(variants)]
    result = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stderr
    return {name: [tuple(gap) for gap in json.loads((root / name / "gaps.json").read_text())] for name in variants}
