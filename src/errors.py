"""What a script turns into one sentence for people, instead of a traceback."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that one sentence explains."""


class CheckpointError(OSError):
    """A file of weights or a run's folder that cannot be read or written, or is not what was asked for."""


class Stopped(Exception):
    """A signal asked for a stop in the middle of work that a later run does again, or goes on with."""


def cause(error: BaseException) -> str:
    """The first words of an error, for a sentence of ours."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


def printable(name: str | bytes) -> str:
    """A file's name for a terminal or a log: bytes that are no text, and what would move the cursor,
    are written as \\xe9 or \\n."""
    text = name.decode(errors="surrogateescape") if isinstance(name, bytes) else name
    if text.isprintable():
        return text
    return "".join(
        x if x.isprintable() else x.encode("unicode_escape").decode().replace("\\udc", "\\x")
        for x in text
    )
