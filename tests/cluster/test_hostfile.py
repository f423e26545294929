"""A hostfile is read as it stands or refused with every bad line named; a host is never an option or code."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.hostfile import is_host, read_hostfile

NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,20}[A-Za-z0-9])?", fullmatch=True)


@settings(max_examples=300)
@given(hosts=st.dictionaries(NAMES, st.integers(1, 1024), min_size=1, max_size=70), data=st.data())
def test_what_is_written_is_what_is_read(
    hosts: dict[str, int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    padding = st.sampled_from(["", " ", "\t", "  # a comment", "\n\n# another\n"])
    lines = [f"{host} slots={slots}{data.draw(padding)}" for host, slots in hosts.items()]
    path.write_text(data.draw(st.sampled_from(["\n", "\r\n"])).join(lines), newline="")
    assert list(read_hostfile(path).items()) == list(hosts.items()), (
        "and the order, which is that of the ranks"
    )


@settings(max_examples=2000)
@given(line=st.one_of(st.text(max_size=40), st.binary(max_size=40)))
def test_no_file_crashes_it_or_smuggles_a_host(
    line: str | bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass"))
    try:
        hosts = read_hostfile(path)
    except ConfigError:
        return
    assert all(is_host(host) and 1 <= slots <= 1024 for host, slots in hosts.items())


# What DeepSpeed 0.19's own reader lets through, and kin.
ATTACKS = [
    "-oProxyCommand=touch${IFS}/x slots=1",
    "a;reboot slots=1",
    "$(id) slots=1",
    "`id` slots=1",
    "h1,h2 slots=1",
    "user@host slots=1",
    "h[1-3] slots=1",
    "\x1b[2Jhost slots=1",
    "\ufeffhost slots=1",
    "host\u0430 slots=1",  # Cyrillic
    "a/../b slots=1",
    "host- slots=1",
    "host slots=0",
    "host slots=-1",
    "host slots=4xyz",
    "host slots=\u0664",  # an Arabic digit
    "host slots=99999999999",
    "host slots=1 slots=2",
    "host slots= 1",
    "host",
]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("good slots=2\n" + "\n".join(ATTACKS) + "\ngood slots=2\n", encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        read_hostfile(path)
    faults = str(refusal.value).splitlines()
    assert [fault.split(":")[1] for fault in faults] == [str(number) for number in range(2, len(ATTACKS) + 3)]
    assert "stands in line 1 already" in faults[-1]
    assert str(refusal.value).isascii() and "\x1b" not in str(refusal.value)
