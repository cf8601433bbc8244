"""Sets of sites by name or glob."""

__all__ = ["SiteNames"]

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase


class SiteNames(set[str]):
    """Names of sites, and all that globs match.

    Args:
        names: The names.
        globs: The globs, or one.
        option: The option that the globs are given for, to name in errors.

    Raises:
        TypeError: If one is no string.

    Example:
        >>> names = SiteNames(["fc.weight"], globs="conv.*")
        >>> "conv.1.weight" in names, "fc.weight" in names, "fc.bias" in names
        (True, True, False)
    """

    def __init__(self, names: Iterable[str] = (), globs: Iterable[str] = (), option: str = "exclude") -> None:
        super().__init__(names)
        self.option = option
        self.globs = (globs,) if isinstance(globs, str) else tuple(globs)
        for glob in self.globs:
            if not isinstance(glob, str):
                raise TypeError(f"{option}: expected names or globs of sites, but got {glob!r}")

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or any(name == glob or fnmatchcase(str(name), glob) for glob in self.globs)

    def check(self, names: Collection[str]) -> None:
        """Checks that there is something for each glob to match.

        Args:
            names: The names of all sites.

        Raises:
            ValueError: If one matches none.

        Example:
            >>> SiteNames(globs=["a", "conv"]).check(["a", "conv.weight"])
            Traceback (most recent call last):
                ...
            ValueError: exclude: expected a name or glob of the guide's sites, of a, conv.weight, but got 'conv'
        """
        for glob in self.globs:
            if not any(name == glob or fnmatchcase(name, glob) for name in names):
                known = ", ".join(names) or "none"
                raise ValueError(
                    f"{self.option}: expected a name or glob of the guide's sites, of {known}, but got {glob!r}"
                )
