"""Sets of sites by name or glob."""

__all__ = ["SiteNames"]

from collections.abc import Collection, Iterable

from ..nn.selection import first_match, require_matches


class SiteNames(set[str]):
    """Names of sites, which a copy is made of, and all names that the globs of an option ``exclude`` match."""

    def __init__(self, names: Iterable[str] = (), globs: str | Iterable[str] = ()) -> None:
        super().__init__(names)
        self.globs = (globs,) if isinstance(globs, str) else tuple(globs)
        for glob in self.globs:
            if not isinstance(glob, str):
                raise TypeError(f"exclude: expected names or globs of sites, but got {glob!r}")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or first_match(self.globs, str(name)) is not None

    def check(self, names: Collection[str]) -> None:
        """Refuses a glob that matches none of the names, those of all sites."""
        require_matches(self.globs, names, "exclude: expected a name or glob of the guide's sites")
