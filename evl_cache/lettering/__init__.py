"""The letters of a picture: fonts of the system for names that matplotlib's own font does not draw.

Gives out `Lettering`, which says in which fonts a picture's texts are drawn, and how what none draws is written.
"""

from evl_cache.lettering.fonts import Lettering

__all__ = ["Lettering"]
