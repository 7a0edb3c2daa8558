"""diffusers' models of the cases in support/derived, seeded, and their folders."""

from __future__ import annotations

import importlib

import torch

from quantized_transformers.loaders.architectures.diffusers_classes import DERIVED
from support import common
from support.derived import CASES

ALL = {", ".join(filter(None, (one.title, case.model, case.kind))): (one, case) for one in DERIVED for case in CASES[one.table]}


def made(one, case, **more):
    """(a seeded model of diffusers in BF16, the same numbers in F32, whose buffers never were anything else, and
    with its companions)."""
    kind, config = common.diffusers_class(case.kind or one.classes[0]), case.config | more
    torch.manual_seed(0)
    stored, net = common.randomise(kind(**config)), kind(**config).eval()
    net.load_state_dict(stored.state_dict())
    net.companions = {part: model.float().eval() for part, model in companions(one, case).items()}
    return stored, net


def companions(one, case):
    """The seeded models of a case's companions, BF16."""
    made = {}
    for name, config in case.companions.items():
        torch.manual_seed(1)
        kind = getattr(importlib.import_module(one.companions[name].place), config["_class_name"])
        made[name] = common.randomise(kind(**{key: value for key, value in config.items() if key != "_class_name"}))
    return made


def saved(one, case, stored, folder, whole=True):
    """A pipeline's folder with a transformer, and the companions of it where it is `whole`."""
    stored.save_pretrained(folder / "transformer")
    for name, net in companions(one, case).items() if whole else ():
        net.save_pretrained(folder / name)
    return folder
