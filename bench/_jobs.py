"""Jobs that run in a process of their own, whose time and peak memory are counted."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def measured(script: str, job: str, *arguments: str) -> dict[str, float]:
    """Run a script's job in a new process; return its seconds, CPU seconds and peak MiB."""
    command = [sys.executable, script, "--job", job, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def is_job(jobs: Mapping[str, Callable[..., None]]) -> bool:
    """Run the job that this process was started for, if it was; the script has then ended."""
    if sys.argv[1:2] != ["--job"]:
        return False
    name, root, *arguments = sys.argv[2:]
    start = time.perf_counter()
    jobs[name](Path(root), *arguments)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "cpu": time.process_time(), "mib": peak_mib()}))
    return True


def peak_mib() -> float:
    """Return the peak of this process's memory, of which Linux tells no parent's share here."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 1024)
