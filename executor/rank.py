"""A rank from its first connection to its last run."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from executor.groups import Place, device_of, start_world, stay_on_loopback
from executor.mail import Mail
from executor.session import Session
from executor.settings import Settings, flags, read_settings
from executor.status import Status

Work = Callable[[Session], None]


def serve(args: argparse.Namespace, status: Status, work: Work = Session.run_all) -> None:
    """Join the world and do the work: every run of the settings. Raises ValueError for what a user can mend."""
    settings = read_settings(args.settings)
    launched = args.store_port > 0
    num_ranks = settings.num_ranks if launched else int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks != settings.num_ranks:
        raise ValueError(f"the layout needs {settings.num_ranks} ranks, but {num_ranks} were started")
    torch.set_num_threads(1)
    device = device_of(settings.backend, args.rank if launched else int(os.environ.get("LOCAL_RANK", "0")))
    place = Place(args.rank, num_ranks, settings.backend, device, settings.timeout_s, launched)
    status.enter("join")
    if launched and settings.bind_address.startswith("127."):
        stay_on_loopback()
    store = _launched_store(args, settings, num_ranks) if launched else _torchrun_store(args.rank, num_ranks, settings)
    mail = Mail(PrefixStore("weft", store), args.rank, num_ranks, settings.timeout_s)
    mail.begin("start")
    mail.agree("flags", flags(settings))
    mail.share_memory()
    start_world(place, PrefixStore("world", store))
    with torch.inference_mode():
        work(Session(settings, place, mail, status))
    mail.gather("bye", 0, int)  # rank 0 holds the store: it leaves last


def _launched_store(args: argparse.Namespace, settings: Settings, num_ranks: int) -> Store:
    """The launcher has opened the listening socket, so that its port is known and on the wanted address alone."""
    timeout = timedelta(seconds=settings.timeout_s)
    if args.store_fd >= 0:
        return TCPStore(settings.bind_address, args.store_port, num_ranks, True, timeout, wait_for_workers=False,
                             master_listen_fd=args.store_fd)  # fmt: skip
    return TCPStore(settings.bind_address, args.store_port, num_ranks, False, timeout, wait_for_workers=False)


def _torchrun_store(rank: int, num_ranks: int, settings: Settings) -> Store:
    """Where torchrun says, or a store of one's own for a single rank."""
    if "MASTER_ADDR" not in os.environ:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        return TCPStore("127.0.0.1", port, 1, True, wait_for_workers=False, master_listen_fd=listener.detach())
    store: Store
    store, _, _ = next(rendezvous("env://", rank, num_ranks, timeout=timedelta(seconds=settings.timeout_s)))
    return store
