"""The real batch script under a real Slurm: slurmctld, and a slurmd on each of several hosts."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import BIN, REPO, Hosts
from test_training_over_hosts import STEPS, assert_same, command, expected, losses

__all__ = ["expected"]  # the fixture
pytestmark = pytest.mark.hosts

CONFIGURATION = """\
ClusterName=toy
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
TreeWidth=64
KillWait=10
GresTypes=gpu
NodeName=node[0-{last}] CPUs=2 RealMemory=2000 Gres=gpu:1
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(BIN.parent),
        }
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, last=hosts.count - 1))
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self.call("slurmctld", "-c")
        for name in hosts.names:
            self.call("slurmd", "-N", name, on=name)
        self.wait_until(lambda: self.call("sinfo", "-h", "-o", "%D %t").strip() == f"{hosts.count} idle")

    def call(self, *words: object, on: str = "node0") -> str:
        done = subprocess.run(
            self.hosts.on(on, *words), capture_output=True, text=True, env=self.environment, cwd=REPO
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def wait_until(self, condition: Callable[[], bool], limit_s: float = 300) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)

    def log(self) -> str:
        """The end of each daemon's log, and then the job's."""
        daemons = [path.read_text()[-3000:] for path in sorted(self.folder.glob("slurm*.log"))]
        return "\n".join([*daemons, *(path.read_text() for path in self.folder.glob("job*.log"))])

    def facts(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))


@pytest.fixture
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    if absent := [name for name in ("slurmctld", "slurmd", "srun") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(absent)} missing; apt-get install slurmctld slurmd slurm-client")
    folder = hosts.folder / "slurm"
    folder.mkdir()
    yield Slurm(hosts, folder)
    for name in hosts.names:
        for line, pid in ((line, pid) for pid, line in hosts.processes(name).items()):
            if "slurm" in line:
                os.kill(pid, 9)


def test_the_batch_script_trains_saves_when_asked_is_queued_again_and_goes_on(
    slurm: Slurm, hosts: Hosts, corpus: Path, expected: dict[int, float]
) -> None:
    run = hosts.out / "slurm-run"
    seen = hosts.view("node0") / run.name
    job = slurm.call(
        *("sbatch", "--parsable", f"--nodes={hosts.count}", "--ntasks-per-node=1", "--gpus-per-node=1"),
        f"--output={slurm.folder}/job.log",
        *("launch/pretrain.sbatch", *command(hosts, corpus, run)[1:]),
    ).strip()
    slurm.wait_until(lambda: max(losses(seen), default=0) >= 5)
    slurm.call("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@300 does in its time
    slurm.wait_until(lambda: slurm.facts(job)["Restarts"] == "1")
    assert "stopped on request" in slurm.log()
    slurm.wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING")
    time.sleep(2)  # a credential made in the second in which the last one was revoked counts as revoked too
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes otherwise
    slurm.wait_until(lambda: max(losses(seen), default=0) >= 10)
    hosts.kill("node1", "pretrain.py --local_rank=0")  # and the wrapper starts it again
    slurm.wait_until(lambda: slurm.facts(job)["JobState"] in ("COMPLETED", "FAILED"))
    assert (slurm.facts(job)["JobState"], slurm.facts(job)["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log()
    assert "rank 1 on node1 was killed (SIGKILL)" in slurm.log()
    assert len(losses(seen)) == STEPS
    assert_same(losses(seen), expected)
