"""How much memory did it take, and does it go back? Peak of this process, without mapped files."""

import ctypes
import sys
import threading
from pathlib import Path

import psutil
import torch


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, in bytes; all resident memory where the system cannot tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Return freed heap to the system: glibc keeps the weights of a dropped block otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """Sample the peak while in context: `host` anonymous bytes, `device` bytes that torch had on a CUDA device."""

    def __init__(self, device: torch.device, interval: float = 0.02) -> None:
        self._watched = device
        self.interval = interval
        self.host = 0
        self.device: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        if self._watched.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._watched)
        return self

    def _sample(self) -> None:
        while True:
            self.host = max(self.host, anonymous_bytes())
            if self._stop.wait(self.interval):
                return

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._watched.type == "cuda":
            self.device = torch.cuda.max_memory_allocated(self._watched)
