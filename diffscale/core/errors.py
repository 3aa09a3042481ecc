"""The errors that a person can cause, told in one screen."""

from __future__ import annotations

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user set, wrote or pointed to cannot be used. Entry points print it and exit with code 2.

    setting: the dotted name of what is wrong (`data.path`, `model.name`), value: what it was,
    expected: what would be valid, fix: what to do about it (optional).
    """

    def __init__(self, *, setting: str, value: object, expected: str, fix: str = "") -> None:
        self.setting, self.value, self.expected, self.fix = setting, value, expected, fix
        super().__init__(self.text())

    def text(self) -> str:
        lines = [f"{self.setting} = {self.value!r}", f"  expected: {self.expected}"]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self):  # Ray carries it from a worker to the driver
        return _rebuild, (self.setting, str(self.value), self.expected, self.fix)


def _rebuild(setting: str, value: str, expected: str, fix: str) -> UserError:
    return UserError(setting=setting, value=value, expected=expected, fix=fix)
