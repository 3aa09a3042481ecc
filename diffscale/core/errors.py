"""Errors that a user can cause, each explained on one screen."""

from __future__ import annotations

import importlib.util

EXIT_USER_ERROR = 2


class SettingError(ValueError):
    """A setting that a network, schedule or solver cannot have; its constructor raises it with the setting's own name.

    `config/factory.py` turns it into a UserError with the dotted key.

    setting: name of the parameter
    value: what it was
    expected: what would be valid, after "expected"
    """

    def __init__(self, setting: str, value: object, expected: str) -> None:
        self.setting, self.value, self.expected = setting, value, expected
        super().__init__(f"{setting} = {value!r}: expected {expected}")

    def __reduce__(self):
        return SettingError, (self.setting, self.value, self.expected)


class UserError(ValueError):
    """Something the user set, wrote or pointed to cannot be used. Commands print it and exit with code 2.

    setting: the dotted name of what is wrong (`data.path`, `model.name`)
    value: what it was
    expected: what would be valid; never a cause
    reason: the cause, where the value alone does not show it
    fix: what to do about it
    """

    def __init__(self, *, setting: str, value: object, expected: str, reason: str = "", fix: str = "") -> None:
        self.setting, self.value, self.expected, self.reason, self.fix = setting, value, expected, reason, fix
        super().__init__(self.text())

    def text(self) -> str:
        lines = [f"{self.setting} = {self.value!r}", f"  expected: {self.expected}"]
        lines += [f"  {name}: {text}" for name, text in (("reason", self.reason), ("fix", self.fix)) if text]
        return "\n".join(lines)

    def fields(self) -> dict[str, str]:
        """Return the arguments that make it again, as text: what crosses from a worker to the command."""
        return {
            "setting": self.setting,
            "value": str(self.value),
            "expected": self.expected,
            "reason": self.reason,
            "fix": self.fix,
        }

    def __reduce__(self):  # Ray carries it from a worker to the driver
        return _rebuild, (self.fields(),)


def _rebuild(fields: dict[str, str]) -> UserError:
    return UserError(**fields)


def require_package(name: str, *, setting: str, value: object, fix: str = "") -> None:
    """Raise UserError if a package is not installed. Nothing is imported.

    name: as in an import
    setting, value: what asks for it
    fix: how to install it; without, `pip install NAME`
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(setting=setting, value=value, expected=f"an installed {name}", fix=fix or f"pip install {name}")
