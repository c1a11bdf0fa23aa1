"""What an attempt raises when the product did not hold."""


class Fault(Exception):  # noqa: N818 - what the product has, not what a caller did
    """The product did something that is not right. Its text says what."""


def need(right: bool, what: str) -> None:
    """Raises Fault unless right."""
    if not right:
        raise Fault(what)
