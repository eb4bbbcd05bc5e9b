"""The one error a user's mistake raises: its message says what was wrong and what would be right."""


class GossamerError(ValueError):
    """A mistake in what was asked for. Nothing has been changed, in the model or on disk, when it is raised."""
