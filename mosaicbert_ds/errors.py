"""Errors that are meant for the person at the keyboard.

A `UserError` carries one sentence: what was given, what is allowed, what to do. The commands print
it without a traceback and exit with code 2. Everything else is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Base of all errors that the user can mend."""


class ConfigError(UserError):
    """A recipe, an override or a DeepSpeed JSON says something impossible."""


class DataError(UserError):
    """Text, tokenizer or shards are missing, damaged or do not fit together."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another model."""


class TrainingError(UserError):
    """A run cannot go on: the loss is no longer finite, a rank is gone."""
