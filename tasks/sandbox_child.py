"""The other side of `sandbox`: reads a job, gives up what it can, runs the program and reports one word.

Run as a file of its own by an isolated interpreter, so it uses the standard library alone. Nothing here is imported
by the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import struct
import sys

_NO_NEW_PRIVILEGES, _SET_SECCOMP, _PARENT_DEATH = 38, 22, 1  # prctl
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_THREAD = 0x00010000  # the flag of clone that makes a thread and not a process
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Landlock: write a file; remove, make (each kind), and from later versions re-link and truncate.
_WRITES, _RELINK, _TRUNCATE = 1 << 1 | sum(1 << bit for bit in range(4, 13)), 1 << 13, 1 << 14

# Numbers of the system calls that are refused: x86-64, ARM64 (None where it has none).
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "shmget": (29, 194), "mq_open": (240, 180),
    "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51),
    "bpf": (321, 280), "perf_event_open": (298, 241), "io_uring_setup": (425, 425),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "reboot": (169, 142), "settimeofday": (164, 170), "clock_settime": (227, 112), "sethostname": (170, 161),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
}  # fmt: skip
# Architecture: (its audit number, column above, clone, clone3, first number of a second set of calls).
_MACHINES = {"x86_64": (0xC000003E, 0, 56, 435, 0x40000000), "aarch64": (0xC00000B7, 1, 220, 435, None)}


def _limit(job: dict) -> bool:
    """Limits of the whole process, which nothing later can raise."""
    import resource

    seconds = int(job["seconds"]) + 1
    wanted = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": job["memory_mb"] * 2**20,
        "RLIMIT_FSIZE": job["file_mb"] * 2**20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    held = True
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):  # macOS refuses some
            held = False
    return held


def _enter_namespace(libc: ctypes.CDLL) -> bool:
    """Leaves the capabilities of the machine behind, and its network."""
    return libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_IPC) == 0


def _close_files(libc: ctypes.CDLL) -> bool:
    """Landlock: no file is made, changed or removed but below the working directory."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    rights = _WRITES | (_RELINK if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    handled = ctypes.c_uint64(rights)
    rules = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint32(0))
    if rules < 0:
        return False
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    below = ctypes.create_string_buffer(struct.pack("=Qi", rights, here))
    added = libc.syscall(_LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), below, ctypes.c_uint32(0))
    held = added == 0 and libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0)) == 0
    os.close(here)
    os.close(rules)
    return held


def _filter(machine: str) -> bytes:
    """A seccomp program: clone makes threads only, clone3 does not exist, the calls above are not permitted."""
    audit, column, clone, clone3, second_set = _MACHINES[machine]
    load, equal, at_least, bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse = (end, 0, 0, _FAIL | errno.EPERM)
    lines = [(load, 0, 0, 4), (equal, 1, 0, audit), refuse, (load, 0, 0, 0)]
    if second_set is not None:
        lines += [(at_least, 0, 1, second_set), refuse]
    lines += [(equal, 0, 1, clone3), (end, 0, 0, _FAIL | errno.ENOSYS)]
    for number in sorted(pair[column] for pair in _REFUSED.values() if pair[column] is not None):
        lines += [(equal, 0, 1, number), refuse]
    # Last, as the flags of clone (its first argument) take the place of the number.
    lines += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, _THREAD), refuse, (end, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def _close_syscalls(libc: ctypes.CDLL) -> bool:
    """seccomp, where the numbers of the machine are known."""
    if platform.machine() not in _MACHINES or sys.byteorder != "little":
        return False
    content = _filter(platform.machine())
    lines = ctypes.create_string_buffer(content, len(content))
    described = struct.pack("@HP", len(content) // 8, ctypes.addressof(lines))
    program = ctypes.create_string_buffer(described, len(described))
    zero = ctypes.c_ulong(0)
    return libc.prctl(_SET_SECCOMP, ctypes.c_ulong(2), program, zero, zero) == 0


def _give_up(job: dict) -> list[str]:
    """Everything this process can do without. Returns the names of what held."""
    steps = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        zero = ctypes.c_ulong(0)
        libc.prctl(_PARENT_DEATH, ctypes.c_ulong(signal.SIGKILL), zero, zero, zero)
        steps = [("namespace", lambda: _enter_namespace(libc))]
        if libc.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) == 0:
            steps += [("files", lambda: _close_files(libc)), ("syscalls", lambda: _close_syscalls(libc))]
    # Limits come before the filter, which refuses to change them.
    steps.insert(len(steps) - 1 if steps else 0, ("limits", lambda: _limit(job)))
    held = []
    for name, step in steps:
        with contextlib.suppress(OSError, AttributeError, ImportError):
            if step():
                held.append(name)
    return held


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    held = _give_up(job)
    os.write(report, (" ".join(held) + "\n").encode())
    namespace = {"__name__": "__main__"}
    word = "died"
    try:
        program = compile(job["program"], "program", "exec")
        tests = [compile(test, "test", "exec") for test in job["tests"]]
        for code in (program, *tests):
            exec(code, namespace)
        word = job["word"]
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no passes either
        word = type(error).__name__
    os.write(report, (word + "\n").encode())
    os._exit(0)  # whatever the program left to run at exit does not


if __name__ == "__main__":
    main()
