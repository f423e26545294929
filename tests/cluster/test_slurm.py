"""The real batch scripts under a real Slurm: slurmctld, and a slurmd on each of several hosts."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import BIN, REPO, Hosts
from test_training_over_hosts import STEPS, alone, assert_same, command, expected, losses

from mosaicbert_ds.training.checkpoint import saved_steps, step_number

__all__ = ["alone", "expected"]  # fixtures
pytestmark = pytest.mark.hosts
GLUE = REPO / "mosaicbert_ds" / "samples" / "glue"

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

    def submit(self, name: str, nodes: int, *words: object) -> str:
        """Start a batch script (or --wrap) on a GPU and a task a node; returns the job's number."""
        size = (f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=1")
        output = f"--output={self.folder}/job.{name}.log"
        return self.call("sbatch", "--parsable", "--open-mode=append", *size, output, *words).strip()

    def wait_for_end(self, job: str) -> None:
        self.wait_until(lambda: self.facts(job)["JobState"] in ("COMPLETED", "FAILED"))
        assert (self.facts(job)["JobState"], self.facts(job)["ExitCode"]) == ("COMPLETED", "0:0"), self.log()

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


@pytest.fixture(scope="module")
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    if absent := [name for name in ("slurmctld", "slurmd", "srun") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(absent)} missing; apt-get install slurmctld slurmd slurm-client")
    folder = hosts.folder / "slurm"
    folder.mkdir()
    yield Slurm(hosts, folder)
    hosts.clear()


def test_the_batch_script_trains_saves_when_asked_is_queued_again_and_goes_on(
    slurm: Slurm, hosts: Hosts, corpus: Path, expected: dict[int, float]
) -> None:
    run = hosts.out / "slurm-run"
    seen = hosts.view("node0") / run.name
    job = slurm.submit("train", hosts.count, "launch/pretrain.sbatch", *command(hosts, corpus, run)[1:])
    # Pre-emption signals all but the batch script; queueing again all, and the script passes that on, as it
    # does the USR1 of --signal.
    for times, stop in enumerate((("scancel", "--signal=TERM"), ("scontrol", "requeue")), 1):
        slurm.wait_until(lambda: slurm.facts(job)["JobState"] == "RUNNING")
        slurm.wait_until(lambda: max(losses(seen), default=0) >= 4 * times)  # noqa: B023
        slurm.call(*stop, job)
        slurm.wait_until(lambda: slurm.facts(job)["Restarts"] == str(times))  # noqa: B023
        assert slurm.log().count("the same command goes on from there") >= times, slurm.log()
        slurm.wait_until(lambda: slurm.facts(job)["JobState"] == "PENDING")
        time.sleep(2)  # a credential made in the second in which the last was revoked counts as revoked too
        slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes otherwise
    slurm.wait_until(lambda: max(losses(seen), default=0) >= 12)
    hosts.kill("node1", "pretrain.py --local_rank=0")  # and the wrapper starts it again
    slurm.wait_for_end(job)
    assert "rank 1 on node1 was killed (SIGKILL)" in slurm.log()
    assert len(losses(seen)) == STEPS
    assert_same(losses(seen), expected)


def test_the_hosts_are_checked_from_inside_a_job(slurm: Slurm, hosts: Hosts, corpus: Path) -> None:
    words = ["mosaicbert", "cluster", "check", "--data", str(corpus), "--recipe", "tiny"]
    words += ["--out", str(hosts.folder / "checked"), "--set", "data.max_length=32", "model.vocab_size=512"]
    slurm.wait_for_end(slurm.submit("check", hosts.count, f"--wrap={shlex.join(words)}"))
    said = (slurm.folder / "job.check.log").read_text()
    assert all(name in said for name in hosts.names) and said.splitlines()[-1] == "ready", said


def test_nodes_share_the_jobs_of_finetuning(slurm: Slurm, hosts: Hosts, alone: Path) -> None:
    out = hosts.folder / "glue"
    tasks = ["--tasks", "rte", "cola", "sst2", "--from-pretrained", "--seeds", "1", "2"]
    words = ["--model", str(alone), "--glue-dir", str(GLUE), "--out", str(out), *tasks]
    slurm.wait_for_end(slurm.submit("glue", 2, "launch/finetune.sbatch", *words, "--set", "max_length=32"))
    logs = [log.read_text() for log in out.glob("jobs/*/log.txt")]
    assert len(logs) == 6 and all(log.count(" on cpu of ") == 1 for log in logs), "each job ran once"
    assert {log.partition(" on cpu of ")[2][:5] for log in logs} == {"node0", "node1"}
    assert "mean of 3 tasks" in (out / "results.md").read_text()


def test_an_array_of_jobs_scores_all_checkpoints(slurm: Slurm, hosts: Hosts, alone: Path) -> None:
    out = hosts.folder / "pareto"
    words = [str(alone), "--glue-dir", str(GLUE), "--out", str(out), "--tasks", "rte", "cola"]
    words += ["--from-pretrained", "--seeds", "1", "--set", "max_length=32"]
    array = slurm.submit("pareto", 1, "--array=0-1", "launch/pareto.sbatch", *words)
    for task in ("0", "1"):
        slurm.wait_for_end(f"{array}_{task}")
    points = list(csv.DictReader((out / "pareto.csv").read_text().splitlines()))
    steps = sorted(step_number(folder) for folder in saved_steps(alone / "checkpoints"))
    assert len(steps) > 1 and [int(point["step"]) for point in points] == steps
    assert (out / "pareto.png").stat().st_size > 10_000
