"""What makes models of the host's own classes tiny: name -> (class below comfy.ldm, its arguments), and for UNets the
class of comfy/supported_models.py, which the host finds by sizes that no tiny one has: a test has to tell that class
others.

`FIXED` are those whose sizes the host's detection has in its code, so that a test has to tell it others; `SMALLER` those
that have numbers in their classes; `NARROWER` those with a part (its class below comfy.ldm) that is large whatever the
sizes are, and what it is given instead of the host's constants. `BESIDE`: name -> what the host reads of a file of it
beside the network, with shapes. `HEADERS`: what the header of a file says of its transformer, of those that names and
sizes alone do not tell from another. `PUBLISHED` makes a file's tensors of the network's, where those differ.
"""

from __future__ import annotations

from typing import Any

from . import audio_3d, images, images_videos, unets, wan_video

PARTS = (images, images_videos, audio_3d, unets, wan_video)
MODELS: dict[str, tuple[Any, ...]] = {name: sizes for part in PARTS for name, sizes in part.MODELS.items()}
FIXED: frozenset[str] = frozenset().union(*(part.FIXED for part in PARTS))
HEADERS: dict[str, dict[str, Any]] = wan_video.HEADERS
NARROWER: dict[str, tuple[str, dict[str, Any]]] = wan_video.NARROWER | images.NARROWER
CLASSED = {name: sizes[2] for name, sizes in MODELS.items() if len(sizes) > 2}
BESIDE: dict[str, dict[str, tuple[int, ...]]] = audio_3d.BESIDE | unets.BESIDE
SMALLER = audio_3d.SMALLER | images_videos.SMALLER | wan_video.SMALLER
PUBLISHED = images.PUBLISHED
