"""What devices say of themselves."""

from __future__ import annotations

import jax

from attnlab.train.hardware import PeakBytes


class Device:
    def __init__(self, held):
        self.held = held

    def memory_stats(self):
        return None if self.held is None else {"peak_bytes_in_use": self.held}


def test_peak_bytes_are_of_this_run(monkeypatch):
    """The most of any device; not what an earlier run of the process held, which devices never forget."""
    devices = [Device(5), Device(7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    held = PeakBytes()
    assert held() is None
    devices[0].held = 9
    assert held() == 9
    devices[:] = [Device(None)]
    assert PeakBytes()() is None
