"""`mosaicbert launch` on several hosts: what reaches them, what ends them, and that nothing is left.

The ranks here are small scripts; `test_training_over_hosts.py` trains for real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import BIN, Hosts
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds import cli
from mosaicbert_ds.cluster import launch as launching
from mosaicbert_ds.cluster.agent import SILENCE_LIMIT_S, Ranks, on_visible_gpus
from mosaicbert_ds.cluster.launch import END_LIMIT_S, Job, Outcome, StopRequest, far_side

HERE = Path(__file__).parent
MARGIN_S = 8.0  # this machine runs all hosts on two cores
SECRET = "canary-5f3a"


class Running:
    """A `mosaicbert launch` on node0, its output, and its time."""

    def __init__(self, hosts: Hosts, *arguments: object, environment: dict[str, str] | None = None) -> None:
        self.log = hosts.folder / f"log-{time.monotonic_ns()}"
        command = hosts.on("node0", BIN / "mosaicbert", "launch", *arguments)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | (environment or {}), start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], bool], limit_s: float = 120) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.05)

    def wait_until_ranks_run(self, count: int) -> None:
        self.wait_until(lambda: self.said().count("is there") == count)
        time.sleep(1.5)  # a heartbeat of each has been told


@pytest.fixture
def clean(hosts: Hosts) -> Iterator[Hosts]:
    """The hosts, and afterwards the proof that nothing is left on any of them."""
    yield hosts
    for name in hosts.names:
        hosts.plug_in(name)
    assert {name: left for name in hosts.names if (left := hosts.leftovers(name))} == {}


NASTY = [
    "plain",
    "two words",
    "",
    "$(touch MARK)",
    "`touch MARK`",
    "; touch MARK;",
    '"; touch MARK; "',
    "'; touch MARK; '",
    "a\nb\ttab",
    "*",
    "-oProxyCommand=touch MARK",
    "%n %h",
    "\\",
    "$HOME",
    "\u00e9\u4e2d",
    "\udcff\udc80",  # bytes that are no UTF-8
]


@pytest.mark.hosts
def test_arguments_and_named_variables_arrive_byte_for_byte_and_nothing_else_does(clean: Hosts) -> None:
    mark = clean.folder / "mark"
    out = clean.folder / "echo"
    out.mkdir()
    arguments = [text.replace("MARK", str(mark)) for text in NASTY]
    value = "\n".join(arguments) + SECRET
    running = Running(
        clean,
        *("--hostfile", clean.hostfile(), "--env", "VALUE", HERE / "echo.py", out, *arguments),
        environment={"VALUE": value, "UNNAMED": "stays here"},
    )
    assert running.process.wait(120) == 0, running.said()
    for rank in range(clean.count):
        told = json.loads((out / str(rank)).read_text())
        assert told["arguments"] == [os.fsencode(text).hex() for text in arguments]
        assert told["values"] == {"VALUE": os.fsencode(value).hex()}
    assert not mark.exists(), "a text was run as code"
    assert SECRET not in running.said()


def cases() -> list[object]:
    """What dies or hangs; on which host of the last two; what the line says; seconds until it is noticed."""
    rank = lambda hosts, name: hosts.kill(name, "endless.py --local_rank=0")  # noqa: E731
    node_launcher = lambda hosts, name: hosts.kill(name, "deepspeed.launcher.launch")  # noqa: E731
    agent = lambda hosts, name: hosts.kill(name, "-m mosaicbert_ds.cluster.agent")  # noqa: E731
    return [
        pytest.param(rank, "rank {rank} on {host} was killed (SIGKILL)", 2, id="rank"),
        pytest.param(node_launcher, "launcher of the ranks on {host} was killed", 2, id="deepspeed-launcher"),
        pytest.param(agent, "agent on {host} (rank {rank}) is gone", 2, id="agent"),
        pytest.param(
            lambda hosts, name: hosts.unplug(name),
            "{host} (rank {rank}) is cut off or down",
            SILENCE_LIMIT_S,
            id="network",
        ),
        pytest.param(
            lambda hosts, name: hosts.kill(name, "endless.py --local_rank=0", signal.SIGSTOP),
            "rank {rank} on {host} hangs",
            6,
            id="stopped-rank",
        ),
        pytest.param(
            lambda hosts, name: (hosts.folder / "hangs").write_text(name[4:]),
            "rank {rank} on {host} hangs",
            6,
            id="hanging-rank",
        ),
    ]


@pytest.mark.hosts
@pytest.mark.parametrize(("fault", "says", "noticed_s"), cases())
def test_whatever_breaks_ends_everything_in_time_with_one_line_and_no_exit_code_0(
    fault: Callable[[Hosts, str], object], says: str, noticed_s: float, clean: Hosts
) -> None:
    hangs = clean.folder / "hangs"
    hangs.write_text("")
    running = Running(clean, "--hostfile", clean.hostfile(), "--hang-limit", 5, HERE / "endless.py", hangs)
    running.wait_until_ranks_run(clean.count)
    rank = clean.count - 2
    fault(clean, f"node{rank}")
    broke_s = time.monotonic()
    code = running.process.wait(noticed_s + END_LIMIT_S + MARGIN_S)
    assert code == 1, running.said()
    (line,) = [line for line in running.said().splitlines() if line.startswith("mosaicbert launch:")]
    assert says.format(rank=rank, host=f"node{rank}") in line, line
    # The host that is cut off ends its own share, unasked.
    while any(clean.leftovers(name) for name in clean.names):
        assert time.monotonic() - broke_s < noticed_s + END_LIMIT_S + MARGIN_S, "something is left"
        time.sleep(0.2)


@pytest.mark.hosts
@pytest.mark.parametrize("victim", ["launch", "ssh"])
def test_a_launcher_or_connection_that_is_killed_leaves_nothing(victim: str, clean: Hosts) -> None:
    hangs = clean.folder / "hangs"
    hangs.write_text("")
    running = Running(clean, "--hostfile", clean.hostfile(), HERE / "endless.py", hangs)
    running.wait_until_ranks_run(clean.count)
    clean.kill("node0", "mosaicbert launch" if victim == "launch" else "-- node1 ")
    broke_s = time.monotonic()
    assert running.process.wait(END_LIMIT_S + MARGIN_S) not in (0, None)
    if victim == "ssh":
        assert "agent on node1 (rank 1) is gone: the connection was killed (SIGKILL)" in running.said()
    while any(clean.leftovers(name) for name in clean.names):
        assert time.monotonic() - broke_s < END_LIMIT_S + MARGIN_S, "something is left"
        time.sleep(0.2)


@pytest.mark.hosts
def test_a_host_that_does_not_answer_is_named_and_left_out_only_where_that_is_allowed(clean: Hosts) -> None:
    away = clean.names[-1]
    clean.unplug(away)
    out = clean.folder / "echo-away"
    out.mkdir()
    arguments = ["--hostfile", clean.hostfile(), "--min-hosts"]
    few = Running(clean, *arguments, clean.count - 1, HERE / "echo.py", out)
    assert few.process.wait(120) == 0, few.said()
    assert len(list(out.iterdir())) == clean.count - 1
    assert f"no answer from {away}" in few.said()
    all_needed = Running(clean, *arguments, clean.count, HERE / "echo.py", out)
    assert all_needed.process.wait(120) == 1
    assert f"error: no answer from {away} (the connection ended with exit code 255)" in all_needed.said()


# -- without hosts


def local(tmp_path: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    hostfile = tmp_path / "localhost"
    hostfile.write_text("localhost slots=2\n")
    command = [BIN / "mosaicbert", "launch", "--hostfile", hostfile, "--port", "29877", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)


def test_it_starts_again_as_often_as_it_was_told_and_not_after_a_persons_mistake(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys, pathlib, time\n"
        "time.sleep(0.5)\n"
        "tries = pathlib.Path(sys.argv[2])\n"
        "if os.environ['RANK'] == '1':\n"
        "    tries.write_text(tries.read_text() + 'x')\n"
        "    sys.exit(int(sys.argv[3]) if len(tries.read_text()) < 3 else 0)\n"
    )
    tries = tmp_path / "tries"
    for code, restarts, ends_with, tried in ((7, 2, 0, 3), (7, 1, 1, 2), (2, 2, 2, 1), (75, 2, 75, 1)):
        tries.write_text("")
        done = local(tmp_path, "--restarts", restarts, script, tries, code)
        assert (done.returncode, len(tries.read_text())) == (ends_with, tried), done.stderr
        if code == 7:
            assert "rank 1 on localhost ended with exit code 7; everything else was ended in" in done.stderr
            assert f"restart 1 of {restarts}" in done.stderr


def test_a_host_that_does_not_answer_has_a_minute_then_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    failed, cut_off = Outcome(1, "rank 1 died"), Outcome(1, "no answer from b", frozenset({"b"}))
    outcomes = iter([failed, cut_off, cut_off, Outcome(0)])
    monkeypatch.setattr(launching, "run_once", lambda *_: next(outcomes))
    monkeypatch.setattr(launching, "_PAUSE_S", 0.25)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    start_s = time.monotonic()
    assert launching.launch(Job(command=["x"]), tmp_path / "hosts", restarts=3, min_hosts=None) == 0
    assert time.monotonic() - start_s >= 0.25 + 0.5
    said = capfd.readouterr().err
    for line in ("died; restart 1 of 3\n", "b; restart 2 of 3 in 0.25 s\n", "b; restart 3 of 3 in 0.5 s\n"):
        assert line in said


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), max_size=4
    )
)
def test_words_for_a_far_shell_come_out_as_they_went_in(words: list[str]) -> None:
    """The one line that a shell on the other side reads, through a real shell."""
    code = "import sys; print(ascii(sys.argv[1:]))"
    *_, host, line = far_side("node0", [sys.executable, "-c", code, *words])
    assert host == "node0"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == f"{words!a}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x.py"], "neither a hostfile nor a Slurm job"),
        (["--env", "A B=1", "--hostfile", "h", "x.py"], "allowed are letters, digits and _"),
        (["--env", "NOT_SET_HERE", "--hostfile", "h", "x.py"], "NOT_SET_HERE is not set here"),
        (["--hostfile", "nowhere", "x.py"], "--hostfile nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert cli.main(["launch", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("visible", "here"),
    [("4,5,6", [4, 5]), ("GPU-1f,GPU-2e", ["GPU-1f", "GPU-2e"]), ("3", [0, 1]), ("", [0, 1])],
)
def test_ranks_take_the_gpus_that_the_host_or_the_job_makes_visible(
    visible: str, here: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may be somebody else's. Fewer than ranks are one task's own, as Slurm binds them."""
    order = {"world": {"a": [0, 1, 2], "b": [0, 1]}, "node_rank": 1, "environment": {}}
    named = order | {"environment": {"CUDA_VISIBLE_DEVICES": visible}}
    for given_by_host, asked in ((True, order), (False, named)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible if given_by_host else "7")
        found = on_visible_gpus(asked)
        assert {host: [str(gpu) for gpu in gpus] for host, gpus in found.items()} == {
            "a": ["0", "1", "2"],
            "b": [str(gpu) for gpu in here],
        }


def test_asked_to_stop_before_the_ranks_can_hear_it_the_launcher_passes_it_on(tmp_path: Path) -> None:
    """A rank imports for seconds before it listens; a pre-empted job must not count as failed."""
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import sys, time\n"
        "from mosaicbert_ds.training.faults import EXIT_STOPPED, StopRequest\n"
        "time.sleep(4)\n"
        "stop = StopRequest()\n"
        "while not stop: time.sleep(0.1)\n"
        "sys.exit(EXIT_STOPPED)\n"
    )
    hostfile = tmp_path / "localhost"
    hostfile.write_text("localhost slots=2\n")
    command = [BIN / "mosaicbert", "launch", "--hostfile", hostfile, "--port", "29878", script]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True) as launcher:
        time.sleep(2.5)  # the launcher itself listens; its ranks are not there, or import
        launcher.send_signal(signal.SIGUSR1)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and "stopped on request" in said, said


@pytest.mark.parametrize(
    ("heard", "times"),
    [
        ([(0.0, "an agent"), (0.6, signal.SIGUSR1)], 1),
        ([(0.0, signal.SIGTERM), (0.3, "an agent"), (1.2, signal.SIGUSR1)], 1),
        ([(0.0, signal.SIGTERM), (60.0, signal.SIGTERM)], 2),
        ([(0.0, signal.SIGINT), (0.2, signal.SIGINT)], 2),
    ],
)
def test_a_schedulers_word_is_one_request_however_many_processes_hear_it(
    heard: list[tuple[float, object]], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second ends the ranks while they save."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = StopRequest()
    for at_s, what in heard:
        monkeypatch.setattr(launching.time, "monotonic", lambda at_s=at_s: 1000 + at_s)
        stop.note_other() if what == "an agent" else stop._note(what, None)
    assert stop.times == times


LAUNCHER = """
import os, subprocess, sys, time

ranks = [subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": str(rank)}) for rank in (0, 1)]
print("started", flush=True)
while not any(rank.poll() for rank in ranks):
    time.sleep(float(sys.argv[1]))
code = next(rank.returncode for rank in ranks if rank.returncode)
for rank in ranks:
    rank.kill()
    rank.wait()
sys.exit(code)
"""


@pytest.mark.parametrize(("looks_every_s", "we_look_after_s"), [(10, 0), (0.01, 1)], ids=["first", "last"])
def test_a_dead_rank_is_named_whether_we_see_it_before_or_after_its_launcher(
    looks_every_s: float, we_look_after_s: float
) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(looks_every_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline()
        ranks = Ranks({"job": "none"}, launcher)
        for _ in range(100):  # a process that has just begun has no environment yet
            ranks.look()
            if len(ranks.pids) == 2:
                break
            time.sleep(0.05)
        try:
            assert ranks.pids.keys() == {0, 1} and ranks.failure() is None
            os.kill(ranks.pids[1], signal.SIGKILL)
            time.sleep(we_look_after_s)
            ranks.wait(5)
            assert ranks.failure() == (-signal.SIGKILL, 1)
        finally:
            ranks.signal(signal.SIGKILL)
            launcher.kill()
