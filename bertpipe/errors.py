"""The errors a user can cause. The command line prints each as one line and exits 2.

A message names the file, key or line it is about and what to do. Our own mistakes are `assert`s.
"""

from __future__ import annotations


class BertpipeError(Exception):
    """Base of the errors below."""


class ConfigError(BertpipeError):
    """A setting is unknown, of the wrong type or contradicts another."""


class DataError(BertpipeError):
    """Input text or a data set can't be read or used as it is."""


class ArtifactError(BertpipeError):
    """An artifact is missing, damaged, in use or made by another recipe."""


class RunError(BertpipeError):
    """A run can't go on: it diverged, or one of its processes is lost or no longer holds what the others hold."""


class DivergedError(RunError):
    """Training came to numbers that are not finite."""


class StorageError(BertpipeError):
    """The disk is full, over quota or failing while something is written."""


class HubError(BertpipeError):
    """The Hugging Face Hub refuses, fails or can't be reached."""


class NoHubError(HubError):
    """It can't be reached: what it would say is not known."""
