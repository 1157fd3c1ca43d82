"""The views of a request: published ones by name, those that suit a data set, and what a user says in their place."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from evl_cache.errors import UsageError
from evl_cache.extract_options import VIEW_RECIPES
from evl_cache.notation import parse_views
from evl_cache.spec import ViewSpec


@dataclass(frozen=True, kw_only=True)
class ViewChoice:
    """What a user says of views; None leaves it to the recipe, the data set, or the default.

    Attributes:
        recipe: name of published views.
        frames, sampling, stride: as in `ViewSpec`.
        views: temporal x spatial, such as `3x1`; or a whole `ViewSpec`, which leaves nothing else to say.
        train_views: augmented views of the train split, in the place of those.
        augment_seed: what the augmented views are drawn from.
        flip: whether to mirror half of them.
        train_split_views: views of the train split as a whole, where they are others.

    Raises: UsageError for an unknown recipe, or for a whole beside its parts.
    """

    recipe: str | None = None
    frames: int | None = None
    sampling: str | None = None
    stride: int | str | None = None
    views: str | ViewSpec | None = None
    train_views: int | None = None
    augment_seed: int | None = None
    flip: bool = False
    train_split_views: ViewSpec | None = None

    def __post_init__(self) -> None:
        if self.recipe is not None and self.recipe not in VIEW_RECIPES:
            raise UsageError(f"recipe {self.recipe!r}; expected one of {', '.join(VIEW_RECIPES)}")
        parts = [name for name in ("frames", "sampling", "stride") if getattr(self, name) is not None]
        of_train = [name for name in ("recipe", "train_views", "augment_seed", "flip") if getattr(self, name)]
        wholes = {"views": parts + of_train} if isinstance(self.views, ViewSpec) else {}
        wholes |= {"train_split_views": of_train} if self.train_split_views is not None else {}
        for whole, beside in wholes.items():
            if beside:
                raise UsageError(
                    f"{whole} is a whole ViewSpec, beside {', '.join(beside)}; give one or the other"
                )

    def resolve(self, usual: Mapping[str, Any]) -> tuple[ViewSpec, ViewSpec | None]:
        """Return the views of validation, and those of the train split where they are others (None: the same).

        Args:
            usual: frames, sampling, stride or views of the data set, where they are not the default.

        Raises: UsageError for choices that contradict each other.
        """
        if isinstance(self.views, ViewSpec):
            return self.views, self.train_split_views
        start = ViewSpec()
        plain = {name: getattr(start, name) for name in ("frames", "sampling", "stride")}
        published: dict[str, Any] = {**plain, "views": start.crops, **usual}
        if self.recipe is not None:
            published = {"stride": start.stride, **VIEW_RECIPES[self.recipe]}
        given = {name: getattr(self, name) for name in ("frames", "sampling", "stride", "views")}
        chosen = published | {name: value for name, value in given.items() if value is not None}
        if chosen["sampling"] == "tsn":  # which takes no stride: one that is given contradicts it
            chosen["stride"] = self.stride
        temporal, spatial = parse_views(chosen.pop("views"))
        views = ViewSpec(**chosen, temporal_views=temporal, spatial_views=spatial)
        if not (self.recipe or self.train_views or self.flip or self.augment_seed):
            return views, self.train_split_views
        return views, replace(
            views,
            temporal_views=1,
            spatial_views=1,
            train_views=self.train_views or 0,
            augment_seed=self.augment_seed or 0,
            flip=self.flip,
        )
