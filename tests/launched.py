"""Processes in a test, forked so that none imports torch again: several as under torchrun, or one command, or one
whose parent has done nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any


def run(size: int, function: Callable[..., None], *args: Any, timeout: float = 240) -> list[str]:
    """Call `function(rank, *args)` in `size` processes with torchrun's environment variables.

    Returns:
        Of each process '' or its traceback.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    pairs = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_one, args=(rank, size, port, pairs[rank][1], function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    ends = [pair[0].recv() if pair[0].poll(timeout) else f"nothing within {timeout} s" for pair in pairs]
    for process in processes:
        process.join(5)
        process.kill()
    return ends


def free_port() -> int:
    """A port that no process uses."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _one(rank: int, size: int, port: int, end: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    _told(end, function, (rank, *args))


def _told(end: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        function(*args)
        end.send("")
    except BaseException:
        end.send(traceback.format_exc())
    os._exit(0)  # nothing of the test process is to be torn down here


def run_from_server(function: Callable[..., None], *args: Any, preload: Sequence[str], timeout: float = 240) -> str:
    """Call `function(*args)`, pickled, in a process forked from one that has only imported the modules `preload`: those
    of the first call.

    Returns:
        '' or its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(sender, function, args))
    process.start()
    fault: str = receiver.recv() if receiver.poll(timeout) else f"nothing within {timeout} s"
    process.join(5)
    process.kill()
    return fault


def start_command(*arguments: str, output: Path) -> ForkProcess:
    """Start `qdora` with these arguments in a process of its own, which writes `output`/stdout and `output`/stderr."""
    from qdora.cli import main  # most tests do not need it

    return start_main(main, "qdora", *arguments, output=output)


def start_main(main: Callable[[], None], *argv: str, output: Path) -> ForkProcess:
    """The same for the main function of another program, whose name is the first of `argv`."""
    process = multiprocessing.get_context("fork").Process(target=_main, args=(main, argv, output))
    process.start()
    return process


def _main(main: Callable[[], None], argv: tuple[str, ...], output: Path) -> None:
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    sys.argv = list(argv)
    main()
