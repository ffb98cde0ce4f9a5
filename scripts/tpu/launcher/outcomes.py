"""How a launch can end, and the exit code of each end that is not the job's own."""

from __future__ import annotations

USAGE = 2
UNAVAILABLE = 69  # BSD's EX_UNAVAILABLE: no slice was to be had
LEFT_BEHIND = 70  # BSD's EX_SOFTWARE: something that is billed could not be deleted
REMOTE = 74  # BSD's EX_IOERR: a slice was there, but copying, installing or starting failed
PREEMPTED = 75  # BSD's EX_TEMPFAIL, what the verbs of speccascade exit with when SIGTERM stopped them
HOST_LOST = 69  # what they exit with on a host that misses another one of the job


class LaunchError(Exception):
    """The launch cannot go on. One clear sentence, and the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Refused(LaunchError):
    """The cloud would not give the slice: quota, capacity, a wrong name, no permission, or the wait was too long."""

    def __init__(self, message: str):
        super().__init__(message, UNAVAILABLE)


class SliceLost(Exception):
    """The slice was taken away, or is as good as gone; the job may be resumed on another one."""


class Interrupted(BaseException):
    """A signal asked the launcher to stop. No Exception, so that nothing but the clean-up catches it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
