"""A fit in several processes: a GPU each (NCCL) where there are GPUs, else gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tsugiki.adapt.fit import FitReport, FitSettings, OutOfMemory, device_name, fit, quiet
from tsugiki.adapt.processes import FSDP, PROCESSES, adapter_state
from tsugiki.errors import UserError
from tsugiki.progress import console
from tsugiki.samples import EncodedSample
from tsugiki.tokenizers import load_tokenizer

GRACE = 5.0  # seconds in which the other processes may say why they end, once one has failed


def settled(settings: FitSettings) -> FitSettings:
    """The settings with the number of processes and FSDP as they are asked for here.

    Raises:
        UserError: more processes than GPUs, or FSDP with one process.
    """
    processes = settings.processes or int(os.environ.get(PROCESSES, 1))
    fsdp = os.environ.get(FSDP) == "1" and processes > 1 if settings.fsdp is None else settings.fsdp
    if fsdp and processes == 1:
        raise UserError("fsdp divides a base among several processes, and there is one", hint="Give their number: --set sweep.processes=2")
    if device_name() == "cuda":
        import torch

        if processes > torch.cuda.device_count():
            raise UserError(f"{processes} processes need {processes} GPUs, there are {torch.cuda.device_count()}",
                            hint="Set sweep.processes to fewer.")
    return replace(settings, processes=processes, fsdp=fsdp)


def fit_in_processes(
    base_dir: Path, samples: Sequence[EncodedSample], settings: FitSettings, work: Path, adapter: Path, *,
    seed: int, threads: int, progress_file: Path | None = None, logs: Path | None = None,
) -> FitReport:
    """Train one adapter in ``settings.processes`` processes of this machine, and write it.

    Where one runs out of memory, all begin again from the last checkpoint with half the samples a pass; where one fails
    otherwise, the others are ended.

    Args:
        base_dir, samples, settings, work, seed, progress_file, logs: as :func:`tsugiki.adapt.fit.fit` takes them.
        adapter: folder that the adapter is written to.
        threads: of all processes together.

    Raises:
        UserError: what a process was ended by.
    """
    while True:
        options = {"seed": seed, "progress_file": progress_file, "logs": logs}
        try:
            return _run((base_dir, list(samples), settings, work, adapter, options), settings.processes, max(1, threads // settings.processes))
        except OutOfMemory:
            share = settings.batch_size // settings.processes
            smaller = next((m for m in range(min(settings.micro_batch, share) // 2, 0, -1) if share % m == 0), 0)
            if not smaller:
                raise
            settings = replace(settings, micro_batch=smaller)
            console.print(f"  [yellow]out of memory: beginning again with {settings.micro_batch} samples a pass, {settings.batch_size} a step as before[/]")


def _run(arguments: tuple, processes: int, threads: int) -> FitReport:
    store = meeting_point()  # held by this process, so that none waits for another to open it
    context = multiprocessing.get_context("spawn")
    running, said = [], []
    try:
        for rank in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            said.append(ours)
            running.append(context.Process(target=_process, args=(rank, processes, store.port, threads, os.getpid(), theirs, arguments)))
            running[-1].start()
            theirs.close()
        results: dict[int, tuple] = {}
        while len(results) < processes:
            ready = wait([said[rank] for rank in range(processes) if rank not in results])
            for rank in range(processes):
                if said[rank] in ready:
                    results[rank] = _received(said[rank], running[rank])
            if any(kind != "done" for kind, _ in results.values()):
                _raise_first(results, running, said)
        return results[0][1]
    finally:
        for process in running:
            if process.is_alive():
                process.terminate()
        for process in running:
            process.join(GRACE)
            if process.is_alive():
                process.kill()
                process.join()


def meeting_point():
    """A server by which processes of this machine find each other; by itself torch's listens to the whole network."""
    from torch.distributed import TCPStore

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _received(connection: Connection, process) -> tuple[str, object]:
    """What a process said at its end, or how it ended without a word."""
    try:
        return connection.recv()
    except EOFError:
        process.join(GRACE)
        return "killed", process.exitcode


def _raise_first(results: dict[int, tuple], running: list, said: list[Connection]) -> None:
    """Raise what ended the fit: a process that was killed, else a reason of the user's, else whatever came first.

    A process that lost another one fails too, sooner or later than that is noticed.
    """
    until = time.monotonic() + GRACE
    while len(results) < len(running) and (left := until - time.monotonic()) > 0:
        for connection in wait([said[rank] for rank in range(len(running)) if rank not in results], left):
            rank = said.index(connection)
            results[rank] = _received(connection, running[rank])
    count = len(running)
    for rank, (kind, value) in results.items():
        if kind == "killed":
            how = f"killed ({signal.Signals(-value).name})" if value and value < 0 else f"ended (status {value})"
            raise UserError(f"process {rank + 1} of {count} of the fit was {how}",
                            hint="A process is killed where main memory runs out. Run the same command again: the fit goes on from its last checkpoint.")
    for kind, value in results.values():
        if kind == "refused":
            raise value
    rank, trace = next((rank, value) for rank, (kind, value) in results.items() if kind == "failed")
    raise RuntimeError(f"process {rank + 1} of {count} of the fit failed:\n{trace}")


def _process(rank: int, processes: int, port: int, threads: int, parent: int, connection: Connection, arguments: tuple) -> None:
    """One process of a fit; the first one writes the adapter. Says ``(kind, value)`` at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent ends this one
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.update({
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": str(threads),
    })
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else the address of the machine's name, which others may reach
    try:
        connection.send(("done", _fit(rank, threads, arguments)))
    except UserError as error:
        connection.send(("refused", error))
    except BaseException:
        connection.send(("failed", traceback.format_exc()))
    connection.close()
    # Without the farewells of torch.distributed, which may wait for a process that is gone.
    os._exit(0)


def _fit(rank: int, threads: int, arguments: tuple) -> FitReport:
    import torch
    from torch import distributed

    quiet()
    torch.set_num_threads(threads)
    base_dir, samples, settings, work, adapter, options = arguments
    if rank:
        options = options | {"progress_file": None}
    model, report = fit(base_dir, load_tokenizer(base_dir), samples, settings, work, **options)
    state = adapter_state(model)
    if rank == 0:
        model.save_pretrained(adapter, state_dict=state, safe_serialization=True)
    distributed.barrier()  # none leaves while another still needs it
    return report


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, so that nothing trains on unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
