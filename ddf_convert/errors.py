"""The errors that reach a user: one clear line that says what is wrong, where, and what to do."""


class DDFError(Exception):
    """Something failed that is not the user's mistake. The command line exits with 1."""

    exit_code = 1


class UsageError(DDFError, ValueError):
    """The user asked for something that cannot be done as asked. The command line exits with 2."""

    exit_code = 2


class ArtifactError(UsageError):
    """A saved conversion cannot be read: missing, damaged, foreign, or of another version."""
