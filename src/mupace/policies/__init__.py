"""Feedback as pure functions of readings: what a run's own measurements propose for its rates."""

from mupace.policies.base import (
    POLICIES,
    Policy,
    Proposal,
    Reading,
    State,
    Verdict,
    policy_of,
    policy_to_dict,
    register_policy,
)

__all__ = [
    "POLICIES",
    "Policy",
    "Proposal",
    "Reading",
    "State",
    "Verdict",
    "policy_of",
    "policy_to_dict",
    "register_policy",
]
