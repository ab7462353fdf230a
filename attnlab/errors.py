"""Errors that are the user's to fix. The command line prints them in one to three lines and exits with 2."""


class UserError(Exception):
    """Something the user asked for cannot be done as asked: a bad config, missing file, unusable workdir."""


class ConfigError(UserError):
    """A config key, type or value that is not allowed; the message names key, value and what is allowed."""


class UnsupportedPattern(UserError):
    """A mixer was asked for something that its `capabilities` declare unsupported."""


class TrainingFailed(Exception):
    """A run cannot go on, though nothing that was asked for was wrong; the command line exits with 1."""


class Damaged(UserError):
    """A file that a run or a corpus left is not what was written: missing, cut off, changed, or of another kind."""


def first_line(error: BaseException) -> str:
    """The start of an exception's message, for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
