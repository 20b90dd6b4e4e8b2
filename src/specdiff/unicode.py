"""Valid Unicode: lone surrogates are replaced, so that every encoder accepts a text."""


def valid(text: str) -> str:
    """`text` with each lone surrogate replaced by U+FFFD; the same object if there is none.

    Undecodable bytes of arguments and standard input arrive as lone surrogates (PEP 383), JSON may
    escape them, and neither tokenizers nor UTF-8 files accept them.
    """
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
