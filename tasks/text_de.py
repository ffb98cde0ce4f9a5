"""Translation into German and correction of German, distinguished by their prefix, over two corpora.

  l10n_translate_de     English -> German, labels of user interfaces
  lohelp_translate_de   English -> German, help texts of an office suite
  l10n_correct_de       German with mistakes -> German, the same labels
  lohelp_correct_de     German with mistakes -> German, the same help texts
  text_de               the mixture of all four

Both corpora are folders as `l10n` describes them. Importing this module registers all of it. The mistakes of an
example are drawn by the number of its row, so they are the same in every run.

    from __gin__ import dynamic_registration
    from speccascade_t5x.tasks import l10n
    from speccascade_t5x.tasks import text_de

    l10n.data_dir.path = 'corpora/l10n_en_de'
    text_de.help_dir.path = 'corpora/lohelp_en_de'
    l10n.vocabulary_file.path = 'pruned/spiece.model'
    text_de.rows.max_chars = 300
"""

from __future__ import annotations

from collections.abc import Callable

from speccascade_t5x.data.seqio_tasks import seqio
from speccascade_t5x.tasks import l10n, metrics
from speccascade_t5x.tasks.mistakes import make_mistakes

HELP_VARIABLE = "SPECCASCADE_LOHELP_DIR"
TRANSLATE = "translate English to German: "  # as T5 and FLAN-T5 were trained
CORRECT = "correct German: "
MIXTURE = "text_de"
# Shares of the examples of the mixture. Help texts are about twice as long as labels, so they are more of the tokens.
RATES = {
    "l10n_translate_de": 0.35,
    "lohelp_translate_de": 0.30,
    "l10n_correct_de": 0.15,
    "lohelp_correct_de": 0.20,
}


def help_dir(path: str | None = None) -> str | None:
    """Names the folder of help texts; None leaves it to the environment variable SPECCASCADE_LOHELP_DIR."""
    return path


HELP = l10n.Corpus(help_dir, "text_de.help_dir.path", HELP_VARIABLE, "the tasks over help texts")


def rows(max_chars: int | None = None) -> Callable[[l10n.Row], bool]:
    """Returns which rows the tasks keep.

    Args:
      max_chars: longest English and longest German side in characters, that length included; None keeps all.
    """
    if max_chars is None:
        return lambda row: True
    return lambda row: max(len(row.en), len(row.de)) <= max_chars


def translation(number: int, row: l10n.Row) -> tuple[str, str]:
    """Row -> (input, target) of the translation tasks."""
    return TRANSLATE + row.en, row.de


def correction(number: int, row: l10n.Row) -> tuple[str, str]:
    """Row -> (input, target) of the correction tasks."""
    return CORRECT + make_mistakes(row.de, number), row.de


for _name, _corpus in (("l10n", l10n.L10N), ("lohelp", HELP)):
    for _kind, _pair in (("translate", translation), ("correct", correction)):
        seqio.TaskRegistry.add(
            f"{_name}_{_kind}_de",
            task_cls=l10n.SentencePieceTask,
            source=l10n.TsvSource(f"{_name}_{_kind}_de", _pair, keep=rows, corpus=_corpus),
            output_features={},
            preprocessors=list(l10n.PREPROCESSORS),
            metric_fns=[metrics.bleu, metrics.chrf, metrics.exact_match],
            shuffle_buffer_size=None,
        )
seqio.MixtureRegistry.add(MIXTURE, list(RATES.items()))
