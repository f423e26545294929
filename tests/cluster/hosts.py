"""Hosts on one machine: each with its own network, address, sshd, processes, /dev/shm and view of the output.

A host is a set of Linux namespaces on a bridge. Root is needed, and iproute2, openssh-server and pdsh.
Nothing of this machine's own /etc or ~/.ssh is changed: the hosts see other files in their place.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
NEEDED = ("ip", "tc", "ssh", "/usr/sbin/sshd", "pdsh", "nsenter", "unshare", "ssh-keygen")


def missing() -> str:
    """Why there can be no hosts here, or nothing."""
    if os.geteuid() != 0:
        return "namespaces need root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} missing; apt-get install iproute2 openssh-server pdsh"
    tried = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True)
    return "namespaces are not allowed here" if tried.returncode else ""


def run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)


class Hosts:
    """`count` hosts node0, node1, ... Each sees a folder of its own at `self.out`; all else is shared."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count, self.out = folder, count, folder / "out"
        self.limit_s = 100.0 * count  # for the tiny recipe: all hosts share this machine's few cores
        self.tag = secrets.token_hex(2)
        self.net = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(250) + 1}"
        self.names = [f"node{number}" for number in range(count)]
        self.inits: dict[str, int] = {}  # of each host: its first process, an sshd
        self._outer: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def _up(self) -> None:
        self.out.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        key = self.folder / "key"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        lines = [f"{self.net}.{10 + number} {name}" for number, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        run("ip", "link", "add", f"br{self.tag}", "type", "bridge")
        run("ip", "link", "set", f"br{self.tag}", "up")
        for number, name in enumerate(self.names):
            self._start(number, name, key)
        for name in self.names:
            self._wait_for_sshd(name)

    def _start(self, number: int, name: str, key: Path) -> None:
        space, cable = f"{self.tag}-{name}", f"v{self.tag}{number}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", cable, "master", f"br{self.tag}", "up")
        run("ip", "-n", space, "addr", "add", f"{self.net}.{10 + number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", space, "link", "set", device, "up")
        ssh, view = self.folder / "ssh" / name, self.folder / "views" / name
        ssh.mkdir(parents=True)
        view.mkdir(parents=True)
        shutil.copy(key, ssh / "host_key")
        (ssh / "host_key").chmod(0o600)
        (ssh / "ssh_config").write_text(
            f"Host *\n IdentityFile {key}\n IdentitiesOnly yes\n StrictHostKeyChecking no\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
        )
        (ssh / "sshd_config").write_text(
            f"ListenAddress {self.net}.{10 + number}\nHostKey /etc/ssh/host_key\n"
            f"AuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "PermitRootLogin yes\nPidFile none\nUseDNS no\nMaxStartups 100\n"
        )
        script = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; mount --bind {ssh} /etc/ssh; "
            f"mount -t tmpfs tmpfs /dev/shm; mount --bind {view} {self.out}; "
            f"exec /usr/sbin/sshd -D -E {self.folder}/sshd.{name}.log"
        )
        isolate = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        outer = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{space}", *isolate, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
        )
        self._outer.append(outer)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        deadline = time.monotonic() + 10
        while not (pids := children.read_text().split()):
            assert time.monotonic() < deadline and outer.poll() is None, f"{name} does not start"
            time.sleep(0.01)
        self.inits[name] = int(pids[0])

    def _wait_for_sshd(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while subprocess.run(self.on(name, "ssh", name, "true"), capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd.{name}.log").read_text()
            time.sleep(0.1)

    def _down(self) -> None:
        for outer in self._outer:
            outer.kill()  # and with it, --kill-child, all processes of the host
            outer.wait()
        for number, name in enumerate(self.names):
            subprocess.run(["ip", "link", "del", f"v{self.tag}{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", f"{self.tag}-{name}"], capture_output=True)
        subprocess.run(["ip", "link", "del", f"br{self.tag}"], capture_output=True)

    def on(self, name: str, *command: object) -> list[str]:
        """The words that run `command` on host `name` without ssh, as if from its console."""
        inside = ["nsenter", f"--target={self.inits[name]}", "--net", "--mount", "--uts", "--pid"]
        return [*inside, f"--wd={os.getcwd()}", *(str(word) for word in command)]  # noqa: PTH109

    def hostfile(self, names: list[str] | None = None, slots: int = 1) -> Path:
        path = self.folder / f"hosts-{secrets.token_hex(3)}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in names or self.names))
        return path

    def view(self, name: str) -> Path:
        """What host `name` sees at `self.out`."""
        return self.folder / "views" / name

    def unplug(self, name: str) -> None:
        run("ip", "link", "set", f"v{self.tag}{self.names.index(name)}", "down")

    def plug_in(self, name: str) -> None:
        run("ip", "link", "set", f"v{self.tag}{self.names.index(name)}", "up")

    def limit(self, mbit_per_s: float, names: list[str] | None = None) -> None:
        """What each host (or those named) can send; 0 for no limit."""
        for name in names or self.names:
            device = ["dev", "eth0", "root"]
            subprocess.run(self.on(name, "tc", "qdisc", "del", *device), capture_output=True)
            if mbit_per_s:
                shape = ["tbf", "rate", f"{mbit_per_s}mbit", "burst", "128kb", "latency", "4s"]
                run(*self.on(name, "tc", "qdisc", "add", *device, *shape))

    def sent_bytes(self, name: str) -> int:
        space = f"{self.tag}-{name}"
        shown = subprocess.run(
            ["ip", "-n", space, "-s", "-j", "link", "show", "eth0"], capture_output=True, check=True
        )
        return json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"]

    def processes(self, name: str) -> dict[int, str]:
        """Command lines of all processes of a host, by their id as this machine sees them."""
        space = Path(f"/proc/{self.inits[name]}/ns/pid").readlink()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "ns" / "pid").readlink() == space:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = line.decode(errors="replace").strip()
            except OSError:
                continue
        return found

    def clear(self) -> None:
        """Kill whatever runs on the hosts beside their sshd."""
        for name in self.names:
            for pid, line in self.processes(name).items():
                if "sshd" not in line:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def leftovers(self, name: str) -> list[str]:
        """Processes, listening ports and shared memory on a host that are not its own sshd's."""
        left = [line for line in self.processes(name).values() if "sshd" not in line and line]
        ports = subprocess.run(
            self.on(name, "ss", "-ltnH"), capture_output=True, text=True, check=True
        ).stdout
        left += [line for line in ports.splitlines() if ":22 " not in line]
        shared = subprocess.run(self.on(name, "ls", "/dev/shm"), capture_output=True, text=True, check=True)
        return left + shared.stdout.split()

    def kill(self, name: str, part_of_command: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to the one process of a host whose command line holds the text."""
        (pid,) = [pid for pid, line in self.processes(name).items() if part_of_command in line]
        os.kill(pid, number)
        return pid
