"""The seqio tasks of this package, imported as `speccascade_t5x.tasks` and nothing else.

Importing it registers nothing and loads no TensorFlow. A gin file registers the tasks with

    from speccascade_t5x.tasks import l10n

  folding   `fold`, the input side of `restore_de` (pure Python)
  metrics   metric functions over texts (no TensorFlow)
  l10n      the tasks `l10n_en_de` and `restore_de` (seqio and TensorFlow)

Tasks through TensorFlow Datasets, or from a file of the user's; each also as `<task>_few_shot`:

  translation     wmt14_en_de, wmt14_en_fr, wmt15_en_de, wmt15_en_fr
  summarization   cnn_dailymail, xsum
  squad           squad_v2
  closed_book     trivia_qa, natural_questions, web_questions
  gsm8k, mbpp     the tasks of these names

  vocabularies    their vocabulary, by name or path
  tfds_source     where their data is
  few_shot        how prompts for decoder-only models show solved examples, some of them from exemplars
  lengths         how long inputs and outputs get, and which split is decoded (no TensorFlow)
  answer_metrics  exact match, F1 and final numbers (no TensorFlow)
  sandbox         where `mbpp` runs what a model wrote, if the user allows it (no TensorFlow)
  in_memory       the base of sources that read a whole file
"""
