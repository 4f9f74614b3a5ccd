"""Which torch this package is for: said once, for `llmkern info`, pyproject.toml (a test compares
them) and `make test-versions`, which runs the tests on each of these."""

FLOOR = (2, 9)  # older ones install beside the package no more (pyproject.toml)

# (torch, the triton that its CUDA build brings); the first is the floor, the last the newest.
TESTED = (("2.9.1", "3.5.1"), ("2.11.0", "3.6.0"), ("2.13.0", "3.7.1"), ("2.14.1", "3.8.0"))


def described() -> str:
    """The range, in words."""
    return f"torch {FLOOR[0]}.{FLOOR[1]} and newer, tested to {TESTED[-1][0]}"


def remark(version: str) -> str | None:
    """What there is to say about a torch of this version; None inside the tested range."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < FLOOR:
        return f"torch {version} is older than what is supported: {described()}"
    if numbers > tuple(int(part) for part in TESTED[-1][0].split(".")[:2]):
        return f"torch {version} is newer than what was tested: {described()}"
    return None
