"""What a run on several processes of one machine listens on: loopback, and nothing else."""

import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from composed import composed
from hdm_lightning import one_machine

JOB = """
import sys
from hdm_lightning.training.launch import launch
from hdm_lightning.training.schedule import run_schedule
if __name__ == "__main__":
    sys.exit(launch(run_schedule, {"config": open(sys.argv[1]).read()}, 2))
"""
LISTEN = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1 as the kernel writes them in /proc/net/tcp and tcp6."""

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux' table of sockets")


def tree(root):
    """The process and all that come from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def sockets(pid):
    """Numbers of the sockets that a process holds."""
    found = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # it or the descriptor has gone meanwhile
        pass
    return found


def listening():
    """Address by number of every socket of this machine that listens."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[9]: row[1].partition(":")[0] for row in rows if row[3] == LISTEN}


def watch(job):
    """Addresses that the process and what it starts listened on until it ended, and how many processes there were."""
    addresses, pids = set(), set()
    while job.poll() is None:
        members = tree(job.pid)
        pids.update(members)
        open_now = listening()
        addresses |= {open_now[number] for pid in members for number in sockets(pid) if number in open_now}
        time.sleep(0.25)  # what listens does so for as long as its process works; looking takes a core's time
    return addresses, len(pids)


def test_the_watch_sees_a_port_that_is_open_to_all():
    script = "import socket, time; s = socket.create_server(('', 0)); time.sleep(1)"
    addresses, _ = watch(subprocess.Popen([sys.executable, "-c", script]))
    assert addresses == {"00000000"}


@pytest.fixture
def meetings():
    """A folder for temporary files whose name is short, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="hdm") as folder:
        yield Path(folder)


def test_a_run_on_two_processes_listens_on_loopback_alone(toy, tmp_path, meetings):
    """A real training with data workers, also where the cluster says to use its network; its files are the group's."""
    job = toy("two")
    job.config["data"]["num_workers"] = 1
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(composed(job.config)))
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "config.yaml")]
    environment = {**os.environ, "TMPDIR": str(meetings), "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, umask=0o027)
    addresses, processes = watch(process)
    assert process.returncode == 0
    assert processes >= 3
    assert addresses and addresses <= LOOPBACK
    assert not list(meetings.glob("hdm-meeting-*"))
    assert (job.folder / "final" / "model_index.json").exists()
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in job.folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {oct(0o640)}, modes


def test_the_meeting_place_is_private_and_goes():
    old = os.umask(0)
    try:
        with one_machine.meeting_place() as place:
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
            (place / "group").write_text("")
            assert os.environ[one_machine.SHARED_STORE_OFF] == "1"
    finally:
        os.umask(old)
    assert not place.exists()
    assert one_machine.SHARED_STORE_OFF not in os.environ
