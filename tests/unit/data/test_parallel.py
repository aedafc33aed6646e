"""Work in several processes: Ctrl-C, a killed process, and progress without a terminal."""

import os
import subprocess
import sys
from functools import partial

import pytest

from hdm_lightning.data import parallel
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.errors import UserError

SLOW = """
import os, signal, sys, threading, time
from functools import partial
from pathlib import Path
from hdm_lightning.cli.command import run_command
from hdm_lightning.data.parallel import ordered_map
from hdm_lightning.whole_files import replacing

def item(folder, number):
    with replacing(Path(folder, str(number))):
        time.sleep(0.3)

def press(folder, when):
    while when == "working" and not list(folder.glob(".*.tmp")):
        time.sleep(0.01)
    time.sleep(0.05 if when == "working" else float(when))
    os.killpg(0, signal.SIGINT)

if __name__ == "__main__":
    folder, when = Path(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=press, args=(folder, when), daemon=True).start()
    sys.exit(run_command(lambda: len(list(ordered_map(partial(item, folder), range(400), processes=2)))))
"""


@pytest.mark.parametrize("when", ["0.05", "0.5", "working"])
def test_ctrl_c_in_several_processes_is_one_line_whenever_it_comes(tmp_path, when):
    """A terminal sends it to all of them: while they start, import or work. What was begun leaves nothing."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "out"), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, start_new_session=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
    assert not list((tmp_path / "out").glob(".*")) and len(list((tmp_path / "out").iterdir())) < 40


def test_a_process_that_is_killed_is_told_and_what_came_before_it_stays():
    """As the system kills one where memory is out: builders and the indexer are told alike."""
    results = ordered_map(partial(divmod, 7), [2, 3], processes=2)
    assert list(results) == [(3, 1), (2, 1)]
    with pytest.raises(UserError, match="was killed") as caught:
        list(ordered_map(os._exit, [3, 4], processes=2))
    assert "same command" in caught.value.hint


@pytest.mark.parametrize(("total", "last"), [(1000, " of 1,000, 0:08:00 to go"), (None, "")])
def test_without_a_terminal_a_line_every_minute_takes_the_place_of_the_bar(monkeypatch, capsys, total, last):
    """Of a set of which 500 samples were finished before; 20 come every 24 s."""
    now = [0.0]
    monkeypatch.setattr(parallel.time, "monotonic", lambda: now[0])
    with parallel.progress_bar("samples", total) as show:
        for done in range(500, 620, 20):
            now[0] += 24.0
            show(done)
    said = capsys.readouterr()
    assert said.out == "" and len(lines := said.err.splitlines()) == 2
    assert lines[1] == f"samples: 600{last}"
