"""A filter of system calls for boxed programs, run by the kernel.

The namespaces isolate; the filter only narrows a program's reach into the kernel. It lists forbidden calls, because the
calls that the runtimes of nine languages need cannot be listed. A forbidden call fails with EPERM. A new call with an
older substitute fails with ENOSYS, so that libraries fall back to that.
"""

import errno
import functools
import platform
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h."""

# name: (number on x86_64, number on aarch64), of asm/unistd_64.h and asm-generic/unistd.h
_FORBIDDEN = {
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # Mounts, namespaces, and files by handle.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # The kernel itself.
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "reboot": (169, 142), "syslog": (103, 116),
    # Keys.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # Settings of the machine.
    "quotactl": (179, 60), "acct": (163, 89), "swapon": (167, 224), "swapoff": (168, 225), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162),
    # Shared memory, which no rlimit counts (so memfd_create below), and message queues.
    "shmget": (29, 194), "msgget": (68, 186),
}  # fmt: skip
_MISSING = {
    "clone3": (435, 435),  # a filter cannot read its flags, which lie behind a pointer
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
_CLONE = (56, 220)
_SOCKET = (41, 198)

_NEW_NAMESPACE = 0x7E020000  # every CLONE_NEW* flag of sched.h that clone takes
_X32 = 0x40000000
_AF_UNIX = 1

# struct seccomp_data: the call's number, the architecture, the lower halves of its arguments
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_NOT_BELOW, _JUMP_IF_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


@functools.cache
def bpf_filter(machine: str = platform.machine()) -> bytes:
    """Return the filter as classic BPF, a row of struct sock_filter (linux/filter.h); empty for an unknown machine."""
    if machine not in _ARCHITECTURES:
        return b""
    column = list(_ARCHITECTURES).index(machine)
    steps = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_JUMP_IF_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        *_deny(_JUMP_IF_NOT_BELOW, _X32, errno.ENOSYS),  # x86's other set of numbers for the same calls
    ]
    for calls, error in ((_FORBIDDEN, errno.EPERM), (_MISSING, errno.ENOSYS)):
        for numbers in calls.values():
            steps += _deny(_JUMP_IF_EQUAL, numbers[column], error)
    steps += [
        _step(_JUMP_IF_EQUAL, _CLONE[column], 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        *_deny(_JUMP_IF_SET, _NEW_NAMESPACE, errno.EPERM),
        _step(_RETURN, _ALLOW),
        _step(_JUMP_IF_EQUAL, _SOCKET[column], 0, 3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_JUMP_IF_EQUAL, _AF_UNIX, 1, 0),
        _step(_RETURN, _ERROR | errno.EAFNOSUPPORT),
        _step(_RETURN, _ALLOW),
    ]
    return b"".join(steps)


def _deny(test: int, value: int, error: int) -> list[bytes]:
    return [_step(test, value, 0, 1), _step(_RETURN, _ERROR | error)]


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; the jumps count the instructions to skip."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
