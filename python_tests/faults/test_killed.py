"""A run that is killed, asked to stop or left waiting loses nothing and ends with the same bits."""

import random
import re
import shutil
import signal
import time
from os import kill

import pytest
from conftest import SHORT
from test_train import assert_same_bits

KILLS = 20
KILLS_IN_SAVES = 3


def test_killed_at_random_points(server, unbroken, text, tmp_path, log, record_property):
    """SIGKILL at 20 random moments or more, 3 at least within a save: resumed, the same bits"""
    folder, chance = tmp_path / "run", random.Random(11)
    checkpoints = folder / "checkpoints"
    argv = ["--run", str(folder), *SHORT, *text]
    kills = in_saves = 0
    begun = time.monotonic()
    while True:
        pid = server.start(argv, log)
        if kills % 2:  # every other kill is aimed at a save: a folder that no reader takes for one
            wanted = kills // 2 % 2 + 1
            while wanted and server.poll(pid) is None:
                if list(checkpoints.glob(".tmp-*")):
                    wanted -= 1
                    while wanted and list(checkpoints.glob(".tmp-*")):
                        time.sleep(0.0005)
                time.sleep(0.0005)
        else:
            until = time.monotonic() + chance.uniform(0, 0.6)
            while time.monotonic() < until and server.poll(pid) is None:
                time.sleep(0.005)
        if server.poll(pid) is None:
            kill(pid, signal.SIGKILL)
        code = server.wait(pid)
        if code == 0:  # it came to its end before it was killed often enough: another one
            assert_same_bits(unbroken, folder)
            if kills >= KILLS and in_saves >= KILLS_IN_SAVES:
                break
            shutil.rmtree(folder)
            continue
        assert code == -signal.SIGKILL, log.read_text()
        kills += 1
        in_saves += bool(list(checkpoints.glob(".tmp-*")) + list(checkpoints.glob(".old-*")))
        if kills >= KILLS and in_saves >= KILLS_IN_SAVES:
            server.run(argv, log)
            break
    record_property("kills", kills)
    record_property("kills within a save", in_saves)
    record_property("seconds of all runs", round(time.monotonic() - begun, 1))
    assert_same_bits(unbroken, folder)
    assert kills >= KILLS and in_saves >= KILLS_IN_SAVES


def test_sigterm_saves_and_exits_0(server, unbroken, text, tmp_path, log, record_property):
    """SIGTERM at five steps: a checkpoint of that step, exit code 0; resumed, the same bits"""
    folder = tmp_path / "run"
    stopped = []
    # No checkpoint but the one that the signal asks for.
    argv = ["--run", str(folder), *SHORT, *text, "--run.checkpoint_interval=0"]
    for _ in range(5):
        pid = server.start(argv, log)
        while server.poll(pid) is None and " loss " not in log.read_text():
            time.sleep(0.002)
        if server.poll(pid) is not None:
            break
        kill(pid, signal.SIGTERM)
        assert server.wait(pid) == 0, log.read_text()
        found = re.search(r"stopped after step (\d+), as asked by SIGTERM", log.read_text())
        if found is None:  # it came with the last step
            break
        stopped.append(int(found[1]))
        assert (folder / "checkpoints" / f"step-{stopped[-1]:08d}").is_dir()
    server.run(argv, log)
    record_property("stopped after steps", stopped)
    assert stopped == sorted(set(stopped)) and stopped
    assert_same_bits(unbroken, folder)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_closed_terminal_and_ctrl_c_save_too(server, text, tmp_path, log, name):
    """Ctrl-C and SIGHUP save the step and exit with 0; resumed, the same command goes on"""
    argv = ["--run", str(tmp_path / "run"), *SHORT, *text, "--run.checkpoint_interval=0"]
    pid = server.start(argv, log)
    while server.poll(pid) is None and " loss " not in log.read_text():
        time.sleep(0.002)
    kill(pid, signal.Signals[name])
    assert server.wait(pid) == 0, log.read_text()
    found = re.search(rf"stopped after step (\d+), as asked by {name}", log.read_text())
    assert found is not None, log.read_text()
    assert f"resuming after step {found[1]}" in server.run(argv, log)


@pytest.mark.parametrize("where", ["step", "loader"])
def test_a_hang_ends_with_all_stacks(server, text, tmp_path, log, where):
    """A step or the thread that makes batches waits for ever: all stacks, exit code 1, in 3 s"""
    argv = ["--run", str(tmp_path / "run"), *SHORT, *text, "--run.hang_timeout=2"]
    begun = time.monotonic()
    out = server.run(argv, log, code=1, hang={"step": 6, "where": where})
    assert time.monotonic() - begun < 120  # a loaded machine; without a guard it takes for ever
    assert "Timeout (0:00:02" in out
    assert "fork_server.py" in out and "in waiting" in out  # where it waits
    assert out.count("Thread 0x") >= 2 and "trainer.py" in out
    # What was saved before is there for the next attempt.
    assert "resuming after step" in server.run(argv, log)


def test_two_runs_on_one_folder(server, text, tmp_path, log):
    """A second run on the folder of a live one is refused; a killed one leaves no lock"""
    folder = tmp_path / "run"
    argv = ["--run", str(folder), *SHORT, *text]
    # The first stays in its tenth step, so that it is alive whenever the second comes.
    first = server.start(argv, tmp_path / "first.log", hang={"step": 10, "where": "step"})
    while not (folder / "metrics.jsonl").exists():
        assert server.poll(first) is None
        time.sleep(0.01)
    before = (folder / "config.toml").read_bytes()
    out = server.run([*argv, "--steps", "48"], log, code=2)
    assert f"in use by process {first}" in out and "Traceback" not in out
    assert (folder / "config.toml").read_bytes() == before
    kill(first, signal.SIGKILL)
    assert server.wait(first) == -signal.SIGKILL
    server.run(argv, log)


def test_a_clock_that_jumps(server, unbroken, text, tmp_path, log):
    """The system clock jumps by up to a year either way at every look: the same bits, sane rates"""
    folder = tmp_path / "run"
    out = server.run(["--run", str(folder), *SHORT, *text], log, clock={"seed": 5})
    assert_same_bits(unbroken, folder)
    rates = re.findall(r"([\d.]+)(K?) tok/s", out)
    assert rates and all(0 < float(number) * (1000 if k else 1) < 1e9 for number, k in rates)
    assert re.findall(r"ETA (\d+:\d\d)$", out, re.MULTILINE)
