"""
Job specs: the resolved, immutable options of a job, one file for each kind.

A spec is validated once, at submission, and stored as JSON in the job table and in
spec.json. It contains every option that affects the result.
"""

from jobs.specs.base import (
    FEATURE_NETWORKS,
    Spec,
    check_name,
    check_quarter,
    difference,
    option_of,
    size_plan,
)
from jobs.specs.evaluate import MIN_IMAGES, EvaluateSpec
from jobs.specs.generate import GenerateSpec
from jobs.specs.imports import ImportSpec
from jobs.specs.train import NETWORK_OPTIONS, NEW_NETWORK_OPTIONS, Augment, TrainSpec, check_same_run

__all__ = [
    "FEATURE_NETWORKS",
    "MIN_IMAGES",
    "NETWORK_OPTIONS",
    "NEW_NETWORK_OPTIONS",
    "Augment",
    "EvaluateSpec",
    "GenerateSpec",
    "ImportSpec",
    "Spec",
    "TrainSpec",
    "check_name",
    "check_quarter",
    "check_same_run",
    "difference",
    "option_of",
    "size_plan",
]
