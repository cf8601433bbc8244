"""Sets of sites by name or glob."""

__all__ = ["SiteNames"]

from collections.abc import Collection, Iterable

from ..nn.selection import first_match


class SiteNames(set[str]):
    """Names of sites, and all names that globs match; ``option`` is what errors call the option with the globs."""

    def __init__(self, names: Iterable[str] = (), globs: Iterable[str] = (), option: str = "exclude") -> None:
        super().__init__(names)
        self.option = option
        self.globs = (globs,) if isinstance(globs, str) else tuple(globs)
        for glob in self.globs:
            if not isinstance(glob, str):
                raise TypeError(f"{option}: expected names or globs of sites, but got {glob!r}")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or first_match(self.globs, str(name)) is not None

    def check(self, names: Collection[str]) -> None:
        """Refuses a glob that matches none of the names, those of all sites."""
        for glob in self.globs:
            if first_match([glob], *names) is None:
                known = ", ".join(names) or "none"
                raise ValueError(
                    f"{self.option}: expected a name or glob of the guide's sites, of {known}, but got {glob!r}"
                )
