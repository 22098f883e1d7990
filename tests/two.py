"""Two processes that JAX joins, for tests that talk to them."""

import contextlib
import multiprocessing
import socket


class Two:
    """``target(process, port, *args of this one, pipe)`` in each."""

    def __init__(self, target, args, preload):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preload])
        pipes = [context.Pipe() for _ in range(2)]
        self.ends = [mine for mine, _ in pipes]
        self.children = [context.Process(target=target, args=(i, port, *args, pipes[i][1])) for i in range(2)]
        for child in self.children:
            child.start()
        for _, other in pipes:
            other.close()      # or nobody notices that a process is gone

    def answers(self):
        """What each of them sends next."""
        assert all(end.poll(120) for end in self.ends), "a process does not answer"
        return [end.recv() for end in self.ends]

    def tell(self, word):
        for end in self.ends:
            end.send(word)

    def end(self):
        for child in self.children:
            child.join(60)
            assert child.exitcode == 0


@contextlib.contextmanager
def two_processes(target, *args, preload):
    """``Two``, killed at the end. preload: the module that both start with."""
    two = Two(target, args, preload)
    try:
        yield two
    finally:
        for child in two.children:
            child.kill()
