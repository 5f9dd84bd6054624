"""What a user can set, one file for each subject, and the rules that settings keep. Standard library only."""

from megatron_scmoe.config.architecture import (
    MOE_EVERY_CHOICES,
    Combine,
    LatentScaling,
    Norms,
    Position,
    Router,
    Shortcut,
)
from megatron_scmoe.config.codec import Codec, CodecConfig, Compensation, Evaluation, HashKind, Refinement, Unique
from megatron_scmoe.config.groups import Group, stages_of_pattern
from megatron_scmoe.config.overlap import Overlap
from megatron_scmoe.config.rules import ConfigError
from megatron_scmoe.config.settings import ARCHITECTURE_FIELDS, CODEC_FIELDS, SUBJECTS, Resume, ScMoEConfig
from megatron_scmoe.config.unique import expected_unique_share

__all__ = [
    "ARCHITECTURE_FIELDS",
    "CODEC_FIELDS",
    "MOE_EVERY_CHOICES",
    "SUBJECTS",
    "Codec",
    "CodecConfig",
    "Combine",
    "Compensation",
    "ConfigError",
    "Evaluation",
    "Group",
    "HashKind",
    "LatentScaling",
    "Norms",
    "Overlap",
    "Position",
    "Refinement",
    "Resume",
    "Router",
    "ScMoEConfig",
    "Shortcut",
    "Unique",
    "expected_unique_share",
    "stages_of_pattern",
]
