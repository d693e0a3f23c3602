"""Ports and memory of the processes that tests start."""

import resource
import socket


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_limited_memory(limit_bytes, action):
    """Run `action` under an address space only a little larger than now."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limit_bytes, before[1]))
    try:
        return action()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
