"""Empties this node before it is taken away: trials keep a checkpoint and leave, and no new ones come.

    python infra/leave_node.py 60

`ray stop` does not do this, whatever its grace period: it ends the raylet first, and with it every worker, unasked.
"""

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

# Ray's own among the raylet's children: without either the raylet ends.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
# Those that trials wait for before they can keep a checkpoint: who scores for them, and who drives their workers.
LAST = ("ray::_ProbeActor", "ray::TrainController")


def leave(raylet: psutil.Process, grace_s: float) -> int:
    """Asks a raylet's workers to leave; how many are still there when all have left, or the time is over."""
    about = " ".join(raylet.cmdline())
    node_id, address = (re.findall(rf"--{name}=(\S+)", about)[0] for name in ("node_id", "gcs-address"))
    workers = [each for each in raylet.children() if not " ".join(each.cmdline()).startswith(AGENTS)]
    # First, or what leaves may be started here again. A cluster that is gone already must not keep trials from leaving.
    drain = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the node is taken away"]
    drain += ["--deadline-remaining-seconds", str(round(grace_s))]
    try:
        subprocess.run(drain, timeout=grace_s / 4, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        sys.stderr.write(f"this node is not drained: {error}\n")
    last = [each for each in workers if " ".join(each.cmdline()).startswith(LAST)]
    first = [each for each in workers if each not in last]
    left, deadline_s = [], time.monotonic() + grace_s
    for some in (first, last):
        for each in some:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
        left += psutil.wait_procs(some, timeout=max(0.0, deadline_s - time.monotonic()))[1]
    return len(left)


if __name__ == "__main__":
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "raylet":
            sys.stdout.write(f"{leave(process, float(sys.argv[1]))} workers have not left\n")
