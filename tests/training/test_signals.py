"""The signals that end a run."""

import signal
import sys

import pytest

from tinyldm.training.signals import Interrupted, Signals

NAMES = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.fixture(autouse=True)
def handlers():
    before = [signal.getsignal(number) for number in NAMES]
    for number in NAMES:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in zip(NAMES, before):
        signal.signal(number, handler)


def test_what_a_shell_ignores_for_us_stays_ignored():
    signal.signal(NAMES[-1], signal.SIG_IGN)
    signals = Signals()
    assert signal.getsignal(NAMES[-1]) is signal.SIG_IGN and signal.getsignal(NAMES[0]) == signals.remember


def test_a_signal_is_remembered_until_somebody_asks(capsys):
    signals = Signals()
    signals.check()
    signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM and "stopping after this step" in capsys.readouterr().out
    with pytest.raises(Interrupted):
        signals.check()


@pytest.mark.parametrize("sent", [[signal.SIGTERM] * 3, NAMES[::-1], NAMES, [signal.SIGINT] * 3])
def test_the_several_signals_of_one_request_to_stop_end_nothing_at_once(sent, monkeypatch, capsys):
    monkeypatch.setattr("os._exit", lambda code: pytest.fail(f"ended at once with {code}"))
    signals = Signals()
    for number in sent:
        signal.raise_signal(number)
    assert signals.received == sent[0] and capsys.readouterr().out.count("stopping after this step") == 1


def test_ctrl_c_that_is_pressed_again_a_second_later_ends_at_once_and_nothing_else_does(monkeypatch):
    at, ended = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: at[0])
    monkeypatch.setattr("os._exit", ended.append)
    signals = Signals()
    for seconds, number in ((0, signal.SIGTERM), (60, signal.SIGTERM), (120, signal.SIGINT), (120.9, signal.SIGINT), (500, NAMES[-1])):
        at[0] = 100 + seconds
        signal.raise_signal(number)
    assert not ended and signals.received == signal.SIGTERM
    at[0] = 100 + 121
    signal.raise_signal(signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


@pytest.mark.parametrize("error", [OSError("the terminal is closed"), RuntimeError("reentrant call inside a print")])
def test_a_signal_that_cannot_be_announced_is_remembered_all_the_same(error, monkeypatch):
    class Gone:
        def write(self, text):
            raise error

        flush = write

    monkeypatch.setattr(sys, "stdout", Gone())
    signals = Signals()
    signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM
