"""Text that every encoder accepts: the one place where malformed text becomes valid."""


def valid(text: str) -> str:
    """`text` with each lone surrogate replaced by U+FFFD; the very same object where there is none.

    Undecodable bytes of arguments and standard input arrive as lone surrogates (PEP 383), JSON may escape them,
    and neither tokenizers nor UTF-8 files take them.
    """
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
