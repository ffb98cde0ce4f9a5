"""MBPP: short Python programs from a description and three asserts, scored by running them.

  mbpp, mbpp_few_shot

The data is a JSONL file of the user's (the published mbpp.jsonl, or the same fields), as no dataset library holds it:

    from speccascade_t5x.tasks import mbpp

    mbpp.data_file.path = 'mbpp.jsonl'
    mbpp.execution.allow_code_execution = True

pass@1 runs what a model wrote, so it is measured only if the second binding says so, and inside bubblewrap only:
docs/security.md says what that protects and what it does not. Without it there is only the share of predictions that
are Python at all.
Splits and prompt are those of Austin et al. 2021, "Program Synthesis with Large Language Models". T5's and mT5's
vocabularies know no line breaks, without which no program runs: choose 'byt5', or a vocabulary that keeps them.
"""

from __future__ import annotations

import ast
import concurrent.futures
import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import few_shot, in_memory, references, sandbox, text_task
from speccascade_t5x.tasks.late import configured

# Inclusive ranges of task_id.
SPLITS = {"train": (601, 974), "validation": (511, 600), "test": (11, 510), "prompt": (1, 10)}
_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_END = "[DONE]"


class Problem(NamedTuple):
    """One line of the file."""

    task_id: int
    text: str
    code: str
    tests: list[str]
    setup: str


class Execution(NamedTuple):
    """See `execution`."""

    allow_code_execution: bool
    limits: sandbox.Limits
    workers: int
    protected: bool


def data_file(path: str | None = None) -> str | None:
    """Names the JSONL file."""
    return path


def execution(
    allow_code_execution: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 512,
    workers: int = 4,
    unprotected: bool = False,
) -> Execution:
    """Says whether programs of a model may run, and within what.

    Args:
      allow_code_execution: measure pass@1.
      seconds: each program may take.
      memory_mb: each may use.
      workers: programs run at once.
      unprotected: run them without bubblewrap, with all that this user may do.

    Raises:
      UserError: no worker.
    """
    checks.whole("mbpp.execution.workers", workers, 1)
    return Execution(allow_code_execution, sandbox.Limits(seconds, memory_mb), workers, not unprotected)


def read_problems(file: Path) -> list[Problem]:
    """Reads and checks a whole file.

    Raises:
      UserError: it is missing or not UTF-8, or a field is missing in a line; the message names file, line and field.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): `mbpp.data_file.path` must name the JSONL file") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number} is not JSON ({error.msg}): give one object a line") from error
        problems.append(_problem(row, f"{file}, line {number}"))
    if len({problem.task_id for problem in problems}) < len(problems):
        raise UserError(f"{file} has a task_id twice: give each problem its own")
    return problems


def _problem(row: Any, where: str) -> Problem:
    """One checked line; the sanitised release says "prompt" for the text and "test_imports" for the set-up."""
    row = row if isinstance(row, dict) else {}
    found = {
        "task_id": row.get("task_id"),
        "text": row.get("text", row.get("prompt")),
        "code": row.get("code"),
        "test_list": row.get("test_list"),
    }
    kinds = {"task_id": int, "text": str, "code": str, "test_list": list}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind) or not found[name]:
            raise UserError(f"{where} has no usable field {name!r}: MBPP has task_id, text, code and test_list")
    if not all(isinstance(test, str) for test in found["test_list"]):
        raise UserError(f"{where} has a test in 'test_list' that is not a text")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    return Problem(found["task_id"], found["text"], _unix(found["code"]), found["test_list"], _unix(setup))


def _unix(code: str) -> str:
    return code.replace("\r\n", "\n").replace("\t", "    ")


class ProblemSource(in_memory.InMemorySource):
    """Problems of a split in the order of their ids."""

    def __init__(self):
        super().__init__("mbpp", tuple(SPLITS))

    def rows(self, split: str) -> list[dict[str, str]]:
        """See `InMemorySource`. Programs that will be run are tried first, before anything is decoded.

        Raises:
          UserError: no file is configured, or what `read_problems` and `execution` raise.
        """
        chosen = configured(execution)()
        if chosen.allow_code_execution:
            sandbox.check(chosen.limits, chosen.protected)
        named = configured(data_file)()
        if not named:
            raise UserError("no data is set for mbpp: bind `mbpp.data_file.path` in gin to the published mbpp.jsonl")
        first, last = SPLITS[split]
        problems = sorted(row for row in read_problems(Path(named).expanduser()) if first <= row.task_id <= last)
        return [
            {
                "inputs": prompt(row),
                "targets": row.code,
                references.FIELD: json.dumps({"tests": row.tests, "setup": row.setup}),
            }
            for row in problems
        ]


def prompt(problem: Problem) -> str:
    """What a model is asked."""
    tests = "\n".join(problem.tests)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text} "
        f"Your code should pass these tests:\n\n{tests}"
    )


def program(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
    """A postprocessor: the tests of a target, and the code in a prediction."""
    if is_target:
        return references.read(example)
    text = text.partition(_END)[0].replace("[BEGIN]", "")
    fenced = _FENCED.search(text)
    return fenced[1] if fenced else text.strip("\n")


def parses(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions that are Python. Runs nothing.

    Raises:
      UserError: there is no prediction.
    """
    if not predictions:
        raise UserError("a metric needs at least one example, got none")
    return {"parses": 100.0 * sum(map(_is_python, predictions)) / len(predictions)}


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return bool(code.strip())


def pass_at_1(targets: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> dict[str, float]:
    """Share of predictions that pass all their tests; nothing unless `execution` allows it.

    Args:
      targets: {"tests": asserts, "setup": code before them} of each problem.
      predictions: programs.

    Raises:
      UserError: no example, not as many predictions as targets, or a machine where no program runs.
    """
    chosen = configured(execution)()
    if not chosen.allow_code_execution:
        logging.getLogger(__name__).warning(
            "pass_at_1 was not measured, as it runs code a model wrote: give --allow_code_execution, or bind "
            "mbpp.execution.allow_code_execution = True, to allow that"
        )
        return {}
    if len(targets) != len(predictions) or not targets:
        raise UserError(f"pass_at_1 needs one prediction per target, got {len(targets)} and {len(predictions)}")
    sandbox.check(chosen.limits, chosen.protected)

    def passes(target: Mapping[str, Any], code: str) -> bool:
        source = f"{target['setup']}\n{code}\n"
        return sandbox.run(source, target["tests"], chosen.limits, chosen.protected).passed

    with concurrent.futures.ThreadPoolExecutor(chosen.workers) as pool:
        passed = list(pool.map(passes, targets, predictions))
    return {"pass_at_1": 100.0 * sum(passed) / len(passed)}


text_task.add(
    "mbpp",
    source=ProblemSource(),
    plain=[],
    metric_fns=[parses, pass_at_1],
    postprocess_fn=program,
    has_references=True,
    # Three examples, task ids 2 to 4.
    shots=few_shot.Shots(
        answer="[BEGIN]\n", after=f"\n{_END}", default=3, split="prompt", skip=1, ends=("You are an expert Python",)
    ),
)
