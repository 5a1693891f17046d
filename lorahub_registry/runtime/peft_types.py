"""Types of our own in PEFT's enum, which cannot be subclassed."""

from __future__ import annotations

from peft.utils.peft_types import PeftType


def member(name: str) -> PeftType:
    """The member of that name; made where there is none."""
    if name in PeftType.__members__:
        return PeftType[name]
    made = str.__new__(PeftType, name)
    made._name_, made._value_ = name, name
    PeftType._member_map_[name] = made
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = made
    type.__setattr__(PeftType, name, made)
    return made
