"""Ctrl-C and its like, from the first line of the program on."""

import os
import signal
import time
from pathlib import Path

import pytest

from svf_lightning.stop import INTERRUPTED, Stop


def wait_until_mapped(process, library):
    """Wait until a process has loaded a library: it is in the middle of its imports."""
    maps = Path(f"/proc/{process.pid}/maps")
    while library not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_a_signal_during_the_imports_ends_the_program_on_one_line(command, library, number):
    process = command.start("fit")
    wait_until_mapped(process, library)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert err.strip() == "svf-lightning: stopped"
    assert out == ""
    assert command.files() == []


def test_the_first_signal_is_kept_where_somebody_looks_and_the_second_one_interrupts():
    stop = Stop()
    with stop:
        stop.starting, stop.gently = False, True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_where_nobody_looks_the_first_signal_interrupts_and_one_that_was_swallowed_comes_again():
    stop = Stop()
    with stop:
        stop.starting = False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.check()


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        with Stop():
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) != interrupt
        assert signal.getsignal(signal.SIGINT) == interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)
