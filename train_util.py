"""The course's own spelling of train_utils."""
from train_utils import *  # noqa: F403
