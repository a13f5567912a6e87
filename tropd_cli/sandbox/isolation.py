"""The walls of one box: namespaces or another user, a root of its own, resource limits. Standard library, Linux only.

Three ways, best first. `namespaces`: root makes process, mount, network and IPC namespaces and the code runs as a user
id that nobody else has. `user-namespace`: the same in a user namespace, without being root or as a root that may not
make the others directly. `other-user`: root without the right to make namespaces; the code runs as a user id of its
own, sees the file system as that user and may reach the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT_MODES, USER_MODES = ("namespaces", "user-namespace", "other-user"), ("user-namespace",)
NOBODY = 65534

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CAPABILITY_VERSION_3 = 0x20080522
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

# What a Python program needs to see of the system, read-only. No home directory, no /etc but the linker's cache.
SYSTEM_DIRECTORIES = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store")
SYSTEM_FILES = ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> int:
    """A libc function that returns -1 and sets errno on failure. Raises OSError naming the function."""
    result: int = getattr(libc, name)(*args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int = 0) -> None:
    call("prctl", option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def modes() -> tuple[str, ...]:
    """The ways worth trying as this user, best first."""
    return ROOT_MODES if os.geteuid() == 0 else USER_MODES


def unused_user_id() -> int:
    """A random user id high in the range that this system can represent, so that no other process runs under it."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    start, _, length = max(ranges, key=lambda r: r[2])
    top = min(length, 2**31)
    user = random.SystemRandom().randrange(start + top // 2, start + top - 2)
    return user if user != NOBODY else user - 1


def enter_namespaces(mode: str) -> None:
    """Leaves the machine's namespaces; the process id namespace begins with the next child."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if mode == "namespaces":
        call("unshare", flags)
    elif user == 0:
        with mapped_by_a_child(unused_user_id()):
            call("unshare", flags | CLONE_NEWUSER)
    else:
        call("unshare", flags | CLONE_NEWUSER)
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")


@contextlib.contextmanager
def mapped_by_a_child(user: int) -> Iterator[None]:
    """Root's user namespace, to be unshared inside: root builds the box, and the code is `user` to the machine.

    The kernel limits no process count for the machine's root, whatever the namespace calls it, so the code needs a
    second id, and two ids can be mapped only from outside the namespace: by a child that stays there.
    """
    reader, writer = os.pipe()
    process = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.close(writer)
            os.read(reader, 1)
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{process}/{kind}").write_text(f"0 0 1\n{NOBODY} {user} 1\n")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        _, status = os.waitpid(child, 0)
    if status:
        raise PermissionError(f"user id {user} could not be mapped into the user namespace")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if s is None else os.fsencode(s) for s in (source, target, kind, options)]
    try:
        call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    except OSError as error:
        raise OSError(error.errno, f"mount {kind or 'bind'} {target}: {os.strerror(error.errno or 0)}") from None


def bind_read_only(source: str, target: str, device: bool) -> None:
    """Shows `source` at `target`, read-only, mounts below it included."""
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = MS_RDONLY | MS_NOSUID | (0 if device else MS_NODEV)  # MOUNT_ATTR_* have the values of these MS_*
    packed = struct.pack("QQQQ", attributes, 0, 0, 0)
    try:
        call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), AT_RECURSIVE, packed, ctypes.c_size_t(32))
    except OSError:  # before Linux 5.12: the top mount only
        mount(None, target, None, MS_REMOUNT | MS_BIND | attributes)


def enter_private_root(root: str, user: int, tmp_bytes: int) -> None:
    """Makes `root`, an empty directory, the file system: system libraries and Python read-only, an empty /tmp.

    Args:
        root: hidden by what is mounted on it, and only for this mount namespace.
        user: owner of the /tmp, the only place that can be written.
        tmp_bytes: size of the /tmp.
    """
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    python = os.path.realpath(sys.base_prefix)
    shown = [d for d in dict.fromkeys((*SYSTEM_DIRECTORIES, sys.base_prefix, python)) if os.path.isdir(d)]
    inside: list[str] = []
    for path in shown:
        if any(path.startswith(d + "/") for d in inside):
            continue
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target)
        bind_read_only(path, target, device=False)
        inside.append(path)
    for path in filter(os.path.exists, SYSTEM_FILES):
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "w").close()
        bind_read_only(path, target, device=path.startswith("/dev/"))
    os.mkdir(root + "/tmp")
    mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={tmp_bytes},nr_inodes=10k,mode=700,uid={user}")
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")


def limit_resources(limits: dict[str, Any]) -> None:
    """CPU seconds, address space, file size, processes and open files, for this process and its children."""
    cpu = max(1, round(limits["cpu_seconds"]))
    memory, file_size = limits["memory_bytes"], limits["file_bytes"]
    for which, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        ceiling = resource.getrlimit(which)[1]
        allowed = hard if ceiling == resource.RLIM_INFINITY else min(hard, ceiling)
        resource.setrlimit(which, (min(soft, allowed), allowed))


def drop_privileges(mode: str, user: int) -> None:
    """No capability, no way to regain one, and a user id of its own wherever root built the box. Cannot be undone."""
    if mode == "user-namespace":
        for capability in range(64):
            with contextlib.suppress(OSError):
                prctl(PR_CAPBSET_DROP, capability)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if mode == "user-namespace":
        call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", *[0] * 6))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if 0 in os.getresuid():
        raise PermissionError("still running as root")
