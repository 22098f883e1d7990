"""``vlm_jax.main`` in a process that lacks what Windows lacks, as far as a POSIX system can play that.

Withheld: the modules and functions below, ``array_record`` (no build there), opening a directory, and forcing to disk
what is open for reading only. Not withheld: what the standard library itself stands on here (``_posixsubprocess``).
"""

import fcntl
import importlib
import os
import shutil
import signal
import sys

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog", "curses", "array_record"}
NAMES = {os: ("pread", "pwrite", "preadv", "fork", "forkpty", "getuid", "geteuid", "getgid", "killpg", "setsid", "mkfifo", "statvfs",
              "sched_getaffinity", "chown", "nice", "getloadavg", "posix_fadvise", "sendfile"),
         signal: ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGKILL", "alarm", "setitimer")}


class Withhold:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ImportError(f"{name} is withheld")


def withhold():
    for name in [n for n in sys.modules if n.partition(".")[0] in MODULES]:
        del sys.modules[name]
    sys.meta_path.insert(0, Withhold())
    for module, names in NAMES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    opened, synced, flags = os.open, os.fsync, fcntl.fcntl

    def open_file(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "a directory cannot be opened", path)
        return opened(path, *args, **kwargs)

    def fsync(handle):
        if flags(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "not open for writing")
        synced(handle)

    os.open, os.fsync = open_file, fsync
    shutil._use_fd_functions = False      # as it decides where directories cannot be opened


if __name__ == "__main__":
    withhold()
    code = importlib.import_module("vlm_jax.main").main()
    assert not {name.partition(".")[0] for name in sys.modules} & MODULES
    sys.exit(code)
