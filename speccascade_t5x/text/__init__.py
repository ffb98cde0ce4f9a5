"""Strings and ids: vocabularies, and lines or JSONL of text."""

from speccascade_t5x.text.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary

__all__ = ["ByteVocabulary", "SentencePieceVocabulary", "Vocabulary"]
