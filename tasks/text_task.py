"""The common part of all text tasks: features over the configured vocabulary, and their registration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.tasks import few_shot, references, vocabularies


class TextTask(seqio.Task):
    """A task whose vocabulary is looked up at first use instead of at registration."""

    @property
    def output_features(self) -> Mapping[str, seqio.Feature]:
        spoken = vocabularies.vocabulary()
        return {name: seqio.Feature(spoken, add_eos=True) for name in ("inputs", "targets")}


class PromptTask(TextTask):
    """A task whose inputs a decoder-only model goes on writing, so no EOS ends them."""

    @property
    def output_features(self) -> Mapping[str, seqio.Feature]:
        features = dict(super().output_features)
        return {**features, "inputs": seqio.Feature(features["inputs"].vocabulary, add_eos=False)}


def add(
    name: str,
    source: seqio.DataSource,
    plain: Sequence[Callable],
    metric_fns: Sequence[Callable],
    prefix: str = "",
    postprocess_fn: Callable | None = None,
    has_references: bool = False,
    shots: few_shot.Shots | None = None,
    task_cls: type[TextTask] = TextTask,
    prompt_cls: type[PromptTask] = PromptTask,
) -> None:
    """Registers `name` and, with `shots`, `<name>_few_shot`.

    Args:
      name: of the task.
      source: raw examples.
      plain: preprocessors from raw examples to "inputs" and "targets" texts, and "references" where there are several.
      metric_fns: over postprocessed texts.
      prefix: put before every input: how T5 is told which task this is. Few-shot prompts have none.
      postprocess_fn: as seqio calls it.
      has_references: `plain` gives "references", see `references`.
      shots: how the few-shot variant prompts.
      task_cls: of `name`.
      prompt_cls: of the few-shot variant.
    """
    # EOS is appended after any cut, as T5 does: a cut text still ends for the model.
    tail = [
        seqio.preprocessors.tokenize,
        *([references.show] if has_references else []),
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ]
    shared = {"source": source, "output_features": {}, "metric_fns": list(metric_fns)}
    seqio.TaskRegistry.add(
        name,
        task_cls=task_cls,
        preprocessors=[*plain, few_shot.prefixed(prefix), *tail],
        postprocess_fn=postprocess_fn,
        **shared,
    )
    if shots is not None:
        seqio.TaskRegistry.add(
            f"{name}_few_shot",
            task_cls=prompt_cls,
            preprocessors=[*plain, few_shot.prompted(shots, source, plain), *tail],
            postprocess_fn=few_shot.cut_answers(shots, postprocess_fn),
            **shared,
        )
