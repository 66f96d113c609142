"""A device's memory counters for the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.calib.memory import LiveBytes

if TYPE_CHECKING:
    from collections.abc import Callable


class Counted:
    """Counts the tensors that really live during a run, of a memory that has so many bytes free."""

    def __init__(self, free: float) -> None:
        self._free, self._live = int(free), LiveBytes()

    def free(self) -> int:
        return self._free

    def most_during(self, run: Callable[[], object]) -> int:
        with self._live:
            run()  # makes known what was there before, such as weights
            before = self._live.most = self._live.now
            run()
        return self._live.most - before
