"""The seqio tasks of this package, imported as `speccascade_t5x.tasks` and nothing else.

Importing it registers nothing and loads no TensorFlow. A gin file registers the tasks with

    from speccascade_t5x.tasks import l10n

  folding   `fold`, the input side of `restore_de` (pure Python)
  metrics   metric functions over texts (no TensorFlow)
  l10n      the tasks `l10n_en_de` and `restore_de` (seqio and TensorFlow)
"""
