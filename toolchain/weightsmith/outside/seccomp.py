"""Blocks system calls that a program does not need, with a seccomp filter for this process.

Run by the sandbox launcher, so it uses only the standard library. Child processes inherit the
filter, and it cannot be removed. Layout of filters: <linux/filter.h>, <linux/seccomp.h>; numbers:
<asm/unistd_64.h> and <asm-generic/unistd.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Sequence

_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_SET_SECCOMP, _FILTER_MODE = 22, 2
_X32 = 0x4000_0000
"""First number of the x32 system calls of x86-64."""
_NEW_NAMESPACES = 0x7E02_0000
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _PACKETS, _KIND = 1, 5, 0xF
_TRUNCATES, _ACCESS = 0o1000, 0o3
_GET_KEYRING_ID, _JOIN_SESSION_KEYRING, _USER_KEYRING = 0, 1, -4
"""See keyctl(2)."""

MACHINES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
"""Machine -> the kernel's audit architecture."""
_X86 = (
    "socket 41 connect 42 bind 49 socketpair 53 clone 56 shmget 29 shmat 30 shmctl 31 semget 64 "
    "semop 65 semctl 66 msgget 68 msgsnd 69 msgrcv 70 msgctl 71 truncate 76 ptrace 101 "
    "pivot_root 155 mount 165 umount2 166 add_key 248 request_key 249 keyctl 250 mq_open 240 "
    "mq_unlink 241 unshare 272 perf_event_open 298 open_by_handle_at 304 setns 308 "
    "process_vm_readv 310 process_vm_writev 311 kcmp 312 bpf 321 userfaultfd 323 open 2 "
    "openat 257 prlimit64 302 inotify_add_watch 254 fanotify_init 300 memfd_create 319"
)
_ARM = (
    "socket 198 connect 203 bind 200 socketpair 199 clone 220 shmget 194 shmat 196 shmctl 195 "
    "semget 190 semop 193 semctl 191 msgget 186 msgsnd 189 msgrcv 188 msgctl 187 truncate 45 "
    "ptrace 117 pivot_root 41 mount 40 umount2 39 add_key 217 request_key 218 keyctl 219 "
    "mq_open 180 mq_unlink 181 unshare 97 perf_event_open 241 open_by_handle_at 265 setns 268 "
    "process_vm_readv 270 process_vm_writev 271 kcmp 272 bpf 280 userfaultfd 282 openat 56 "
    "prlimit64 261 inotify_add_watch 27 fanotify_init 262 memfd_create 279"
)
_BOTH = (
    "io_uring_setup 425 io_uring_enter 426 io_uring_register 427 open_tree 428 move_mount 429 "
    "fsopen 430 fsconfig 431 fsmount 432 fspick 433 clone3 435 openat2 437 pidfd_getfd 438 "
    "mount_setattr 442 memfd_secret 447"
)
NUMBERS = {
    machine: {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}
    for machine, text in (("x86_64", _X86), ("aarch64", _ARM))
    if (words := f"{text} {_BOTH}".split())
}
"""Machine -> name -> number of the system calls that are refused or inspected."""

_UNKNOWN = (
    *("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("memfd_create", "memfd_secret"),
)
"""Refused with ENOSYS: callers then use an older call."""
_OF_SOCKETS = ("connect", "bind")
_LOOKED_AT = ("socket", "socketpair", "clone", "open", "openat", "openat2", "truncate", "prlimit64")

Code = tuple[int, int, int, int]
"""Operation, jump if true, jump if false, operand."""


def job_filter(
    machine: str, *, landlock: int, sockets: bool = False, serves: bool = False
) -> bytes:
    """Return a job's filter: no sockets except its own pairs, no access to other processes.

    `landlock` is the ABI in force: before the third, Landlock allows truncating files, so that is
    refused here. Namespaces, mounts, keys, watching folders, System V IPC and memory without a
    file, which no limit counts, are refused too. `sockets` allows sockets of the internet, local
    ones and netlink: no network namespace closes the others, such as vsock. `serves` is for an
    untrusted server that runs as the user: it may accept connections but not open any, because a
    container engine, D-Bus or ssh-agent would act for it.
    """
    numbers = NUMBERS[machine]
    let = {*_LOOKED_AT, *(_OF_SOCKETS if sockets else ())}
    plain = {name: errno.EPERM for name in numbers if name not in let}
    plain |= dict.fromkeys(_UNKNOWN, errno.ENOSYS)
    plain |= {} if sockets else {"connect": errno.ECONNREFUSED}
    blocks = [_refused(numbers[name], code) for name, code in plain.items()]
    blocks.append(_block(numbers["clone"], _no_bit(0, _NEW_NAMESPACES)))
    # 0 is the process itself; a CPU limit of 0 would kill any other process of the user.
    blocks.append(_block(numbers["prlimit64"], _no_bit(0, 0xFFFF_FFFF)))
    if sockets:
        families = (_INET, _INET6, _NETLINK, *(() if serves else (_UNIX,)))
        tests = [(_IF_EQUAL, len(families) - n, 0, each) for n, each in enumerate(families)]
        last = [_answer(errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
        blocks.append(_block(numbers["socket"], [_argument(0), *tests, *last]))
    else:
        blocks.append(_block(numbers["socket"], _local_stream()))
    if serves:
        blocks.append(_refused(numbers["connect"], errno.ECONNREFUSED))
    if serves or not sockets:
        blocks.append(_block(numbers["socketpair"], _local_stream()))
    if landlock < 3:
        blocks += [_refused(numbers["truncate"], errno.EPERM)]
        blocks += [_refused(numbers["openat2"], errno.ENOSYS)]
        blocks += [_block(numbers["openat"], _no_cut(2))]
        blocks += [_block(numbers["open"], _no_cut(1))] if "open" in numbers else []
    return program(machine, blocks)


def program(machine: str, blocks: Iterable[Sequence[Code]]) -> bytes:
    """Return a filter of these blocks, which allows what none of them refuses."""
    other = [_answer(errno.ENOSYS)]
    codes: list[Code] = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_IF_EQUAL, 1, 0, MACHINES[machine]),
        *other,
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, 0, 1, _X32),
        *other,
    ]
    for block in blocks:
        codes += block
    codes.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *code) for code in codes)


def install(filter_: bytes) -> None:
    """Install a filter for this process; needs no_new_privs. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    head = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(buffer))
    if libc.prctl(_SET_SECCOMP, _FILTER_MODE, head, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")


def leave_keys() -> None:
    """Take an empty session keyring: a child has its parent's, whatever its user and namespaces.

    If there can be none, it stays, and only the filter keeps it from the program.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(NUMBERS[machine()]["keyctl"], _JOIN_SESSION_KEYRING, None)


def uses_keys() -> bool:
    """Say whether this process can use the kernel's keys, or whether that is not known."""
    libc = ctypes.CDLL(None, use_errno=True)
    ring = ctypes.c_int(_USER_KEYRING)
    try:
        number = NUMBERS[machine()]["keyctl"]
    except OSError:
        return True
    result = libc.syscall(number, _GET_KEYRING_ID, ring, 0)
    return bool(result >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS))


def machine() -> str:
    """Return this machine's name; raises OSError if its system calls are not listed here."""
    name = platform.machine()
    if name not in MACHINES:
        raise OSError(errno.ENOSYS, f"the system calls of {name} are not known")
    return name


def _refused(number: int, code: int) -> list[Code]:
    return _block(number, [_answer(code)])


def _block(number: int, codes: list[Code]) -> list[Code]:
    """Return code that runs only for one system call."""
    return [(_IF_EQUAL, 0, len(codes), number), *codes]


def _answer(code: int) -> Code:
    return (_RETURN, 0, 0, _ERRNO | code)


def _argument(index: int) -> Code:
    """Load an argument's lower 32 bits, which hold flags and types."""
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)


def _local_stream() -> list[Code]:
    """Allow only Unix stream sockets, which reach nothing before they are connected.

    Datagram sockets can send without that. Libraries do create stream sockets and continue if the
    connection fails: CUDA looks for its MPS daemon.
    """
    return [
        _argument(0),
        (_IF_EQUAL, 0, 4, _UNIX),
        _argument(1),
        (_AND, 0, 0, _KIND),
        (_IF_EQUAL, 2, 0, _STREAM),
        (_IF_EQUAL, 1, 0, _PACKETS),
        _answer(errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _no_bit(index: int, bits: int) -> list[Code]:
    return [
        _argument(index),
        (_IF_ANY_BIT, 0, 1, bits),
        _answer(errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def _no_cut(index: int) -> list[Code]:
    """Refuse to open a file read-only and truncate it at once."""
    return [
        _argument(index),
        (_AND, 0, 0, _TRUNCATES | _ACCESS),
        (_IF_EQUAL, 0, 1, _TRUNCATES),
        _answer(errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
