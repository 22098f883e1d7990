"""Reader processes (``data.workers``): a function of the step number, computed in processes that end with their parent.

A process is ``python -m vlm_jax.data.reader``, started by its parent: not a fork, which JAX's threads do not survive, and no
second run of the main script, so that unguarded scripts and notebooks work. It imports neither JAX nor Grain. Its stdin
brings the function, pickled, and then numbers; its stdout takes a frame for each: the count of its parts, their sizes, a
pickle of (done, value or exception), and the arrays in it as they lie in memory. It ends when its stdin or its parent does,
killed or not.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.errors import ConfigError

_NUMBER = struct.Struct("<q")


class Readers:
    """``steps`` in ``count`` processes: called with a step, it returns or raises what ``steps(step)`` does there.

    As many threads as there are processes may call it. Raises ConfigError where ``steps`` cannot be sent, RuntimeError
    that names the exit status where a process died. ``close()`` ends them, and so does letting go of this object.
    """

    def __init__(self, steps: Callable[[int], Any], count: int):
        try:
            told = pickle.dumps(steps, pickle.HIGHEST_PROTOCOL)
        except Exception as error:      # pickle's own, and whatever an object's methods raise
            raise ConfigError(f"workers={count}: {_unsendable(error)}") from error
        # the parent's path and nothing before it: not the working directory, which -m alone would put there
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
        self.processes = [subprocess.Popen([sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
                          for _ in range(count)]
        self.close = weakref.finalize(self, _end, self.processes)
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):      # told by ``check``
                _send(process, _NUMBER.pack(len(told)), told)
            self._idle.put(process)

    def __call__(self, step: int) -> Any:
        process = self._idle.get()
        try:
            _send(process, _NUMBER.pack(step))
            parts = _receive(process.stdout)
        except (EOFError, BrokenPipeError):
            raise self._death(process) from None
        finally:
            self._idle.put(process)
        done, value = pickle.loads(parts[0], buffers=parts[1:])
        if done:
            return value
        raise value

    def check(self) -> None:
        """Raises RuntimeError where a process has died."""
        for process in self.processes:
            if process.poll() is not None:
                raise self._death(process)

    def _death(self, process: subprocess.Popen) -> RuntimeError:
        status = process.wait()
        if status >= 0:
            how = f"ended with exit status {status}; its error stands above"
        else:
            how = f"was killed by signal {-status}{' (out of memory?)' if status == -9 else ''}"
        return RuntimeError(f"reader process {process.pid}, one of workers={len(self.processes)}, {how}")


def _send(process: subprocess.Popen, *parts: bytes) -> None:
    for part in parts:
        process.stdin.write(part)
    process.stdin.flush()


def _receive(stream: BinaryIO) -> list[np.ndarray]:
    def read(size: int) -> np.ndarray:
        part = np.empty(size, np.uint8)
        if stream.readinto(part) != size:
            raise EOFError
        return part

    count, = _NUMBER.unpack(read(_NUMBER.size))
    return [read(size) for size in read(8 * count).view(np.int64).tolist()]


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):      # bytes that it did not take
                stream.close()


def _unsendable(error: BaseException) -> str:
    return (f"the source or tokenizer cannot be sent to reader processes ({type(error).__name__}: {error}). What they hold must be "
            "picklable, and their classes importable, not defined in the script or notebook itself; workers=0 reads in threads")


# ---- the process -------------------------------------------------------------------------------

def _listen(stream: BinaryIO, requests: queue.SimpleQueue) -> None:
    """Hands on what the parent says; the end of it ends the process, whatever it is doing."""
    def read(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            os._exit(0)
        return data

    requests.put(read(_NUMBER.unpack(read(_NUMBER.size))[0]))
    while True:
        requests.put(_NUMBER.unpack(read(_NUMBER.size))[0])


def _watch(parent: int) -> None:
    """Ends the process with its parent even where another, forked from the parent, keeps our stdin open."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _answer(stream: BinaryIO, answer: tuple[bool, Any]) -> None:
    buffers: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(answer, 5, buffer_callback=buffers.append)), *(b.raw() for b in buffers)]
    stream.write(_NUMBER.pack(len(parts)) + b"".join(_NUMBER.pack(part.nbytes) for part in parts))
    for part in parts:
        stream.write(part)
    stream.flush()


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note; another one in its stead where it does not survive pickling."""
    error.add_note("In a reader process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):      # meant for the parent, which may need more batches before it stops
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)      # what libraries print is no answer
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    refused = None
    try:
        steps = pickle.loads(requests.get())
    except Exception as error:
        refused = ConfigError(_unsendable(error))
    with contextlib.suppress(BrokenPipeError):      # the parent is gone
        while True:
            step = requests.get()
            try:
                answer = (False, refused) if refused else (True, steps(step))
            except Exception as error:
                answer = False, _sendable(error)
            _answer(answers, answer)
    os._exit(0)


if __name__ == "__main__":
    main()
