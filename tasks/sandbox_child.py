"""The inner side of `sandbox`: reads a job, limits itself, runs the program and its tests, and reports one word.

Run as a file of its own by an isolated interpreter, so it uses the standard library alone. Nothing here is imported
by the package.
"""

import json
import os
import resource
import sys


def _limit(limits: dict, protected: bool) -> None:
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):  # macOS knows only some of them
            if protected:
                raise


def main() -> None:
    job = json.loads(sys.stdin.buffer.read())
    secret, report = os.dup(int(sys.argv[1])), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for number in set(range(3, 1024)) - {secret, report}:
        try:
            os.close(number)
        except OSError:
            continue
    os.environ.clear()
    _limit(job["limits"], job["protected"])
    namespace = {"__name__": "__main__"}
    try:
        program = compile(job["program"], "program", "exec")
        tests = [compile(test, "test", "exec") for test in job["tests"]]
        for code in (program, *tests):
            exec(code, namespace)
        word = os.read(secret, 64)  # not before, so that no variable of this process shows it to the program
    except BaseException as error:  # SystemExit and KeyboardInterrupt are no passes either
        word = type(error).__name__.encode()
    os.write(report, word)
    os._exit(0)  # whatever the program left to run at exit does not


if __name__ == "__main__":
    main()
