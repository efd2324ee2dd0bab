"""The signals that end a run."""

import signal

import pytest

from tinyldm.training.signals import Interrupted, Signals


def test_what_a_shell_ignores_for_us_stays_ignored():
    names = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.getsignal(number) for number in names]
    try:
        for number in names:
            signal.signal(number, signal.SIG_IGN if number == names[-1] else signal.SIG_DFL)
        signals = Signals()
        assert signal.getsignal(names[-1]) is signal.SIG_IGN and signal.getsignal(names[0]) == signals.remember
    finally:
        for number, handler in zip(names, before):
            signal.signal(number, handler)


def test_a_signal_is_remembered_until_somebody_asks(capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signals = Signals()
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and "stopping after this step" in capsys.readouterr().out
        with pytest.raises(Interrupted):
            signals.check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
