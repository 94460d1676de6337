"""Views: what a picture, a noisy latent and a noise estimate all understand. Start in `grid`.

grid         View, and the symmetries of the square
zoo          the named views, and parse_view
transforms   what training draws: views at random, and rescaling
components   parts that add up to a picture, in place of views
motion       how a picture moves from view to view, in rigid pieces
"""

from eqldm.views.grid import D4, D4_NAMES, IDENTITY, NEGATE, View, turn
from eqldm.views.transforms import GROUPS, Group, Rescale, Transform, draw_rescale, draw_transform, transform_each
from eqldm.views.zoo import ALIASES, parse_view, patch_permute

__all__ = [
    "ALIASES", "D4", "D4_NAMES", "GROUPS", "IDENTITY", "NEGATE", "Group", "Rescale", "Transform", "View", "draw_rescale", "draw_transform",
    "parse_view", "patch_permute", "transform_each", "turn",
]  # fmt: skip
