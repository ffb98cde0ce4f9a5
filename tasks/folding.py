"""Folding: what `restore_de` removes from German text and a model has to restore."""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """Returns `text` in lower case, with 'ß' as 'ss' and without accents.

    In this order: `str.lower`; every 'ß' becomes 'ss'; Unicode NFKD; combining characters are
    dropped. Compatibility characters come apart on the way ('…' gives '...'); everything else
    stays, quotes and dashes included.

    >>> fold("Größe der Schaltfläche …")
    'grosse der schaltflache ...'
    """
    decomposed = unicodedata.normalize("NFKD", text.lower().replace("ß", "ss"))
    return "".join(c for c in decomposed if not unicodedata.combining(c))
