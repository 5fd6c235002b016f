"""The filter of system calls, run by a small interpreter."""

import errno
import re
import struct
from pathlib import Path

import pytest

from rewards.sandbox import seccomp

X86_64, AARCH64 = 0xC000003E, 0xC00000B7
ALLOWED, KILLED = 0x7FFF0000, 0x80000000
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def verdict(machine: str, architecture: int, number: int, first_argument: int = 0) -> int:
    """Interpret the filter as the kernel does."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, first_argument, 0, 0, 0, 0, 0)
    steps = list(struct.iter_unpack("=HBBI", seccomp.bpf_filter(machine)))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        match code:
            case 0x20:
                accumulator = struct.unpack_from("=I", data, value)[0]
            case 0x06:
                return value
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x45:
                at += if_true if accumulator & value else if_false
            case _:
                raise AssertionError(f"no such instruction {code:#x}")


def refused(error: int) -> int:
    return 0x00050000 | error


@pytest.mark.parametrize(
    ("machine", "architecture", "read", "ptrace", "clone", "socket"),
    [("x86_64", X86_64, 0, 101, 56, 41), ("aarch64", AARCH64, 63, 117, 220, 198)],
)
def test_calls(machine: str, architecture: int, read: int, ptrace: int, clone: int, socket: int) -> None:
    def result(number: int, first_argument: int = 0) -> int:
        return verdict(machine, architecture, number, first_argument)

    assert result(read) == ALLOWED
    assert result(ptrace) == refused(errno.EPERM)
    assert result(425) == result(435) == refused(errno.ENOSYS)  # io_uring_setup, clone3
    assert result(clone, 0x11) == result(clone, 0x003D0F00) == ALLOWED  # a fork, and a thread of glibc's
    assert result(clone, 0x10000011) == result(clone, 0x40000000) == refused(errno.EPERM)
    assert result(socket, 1) == ALLOWED
    assert result(socket, 2) == result(socket, 10) == result(socket, 16) == refused(errno.EAFNOSUPPORT)


def test_another_machine_s_calls_kill() -> None:
    assert verdict("x86_64", 0x40000003, 0) == KILLED  # the 32-bit calls of the same processor
    assert verdict("aarch64", X86_64, 63) == KILLED


def test_the_second_set_of_numbers_is_closed() -> None:
    assert verdict("x86_64", X86_64, 0x40000000 | 101) == refused(errno.ENOSYS)


def test_other_machines_have_no_filter() -> None:
    assert seccomp.bpf_filter("riscv64") == b""


@pytest.mark.skipif(not HEADER.exists(), reason="needs the kernel's headers")
def test_the_numbers_are_the_kernel_s() -> None:
    kernel = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text()))
    own = {name: number for name, (number, _) in (seccomp._FORBIDDEN | seccomp._MISSING).items()}
    assert own == {name: int(kernel[name]) for name in own}
